-- What the answer cache and the providers' prefix caches saved.
SELECT
    date, -- The day of `ended_at` in UTC.
    tenant, -- Whose requests they were.
    sum(requests) AS requests, -- [requests] How many ended.
    sum(requests * CASE WHEN cache_status = 'hit' THEN 1 ELSE 0 END) AS hits, -- [requests] Answered from the cache.
    sum(requests * CASE WHEN cache_status = 'miss' THEN 1 ELSE 0 END) AS misses, -- [requests] Looked for and not found.
    sum(CASE WHEN cache_status = 'hit' THEN requests ELSE 0 END) * 1.0
      / sum(CASE WHEN cache_status IN ('hit', 'miss') THEN requests END) AS hit_share, -- Hits among hits and misses, from 0 to 1; null without either.
    sum(list_nano_usd) AS list_nano_usd, -- [nano-USD] What the answers would have cost without any cache.
    sum(billed_nano_usd) AS billed_nano_usd, -- [nano-USD] What they cost.
    sum(saved_by_cache_nano_usd) AS saved_by_cache_nano_usd, -- [nano-USD] What the answer cache saved.
    sum(saved_by_prefix_nano_usd) AS saved_by_prefix_nano_usd, -- [nano-USD] What is left of list over billed: prefix caches.
    sum(cached_read_tokens) AS cached_read_tokens -- [tokens] Read from prefix caches.
FROM outcomes_hourly
GROUP BY date, tenant
