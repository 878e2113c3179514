-- What the answer cache and the providers' prefix caches saved.
SELECT
    date, -- The day of `ended_at` in UTC.
    tenant, -- Whose requests they were.
    count(*) AS requests, -- [requests] How many ended.
    count(*) FILTER (WHERE cache_status = 'hit') AS hits, -- [requests] Answered from the cache.
    count(*) FILTER (WHERE cache_status = 'miss') AS misses, -- [requests] Looked for and not found.
    count(*) FILTER (WHERE cache_status = 'hit') * 1.0
      / nullif(count(*) FILTER (WHERE cache_status IN ('hit', 'miss')), 0) AS hit_share, -- Hits among hits and misses, from 0 to 1; null without either.
    sum(list_nano_usd) AS list_nano_usd, -- [nano-USD] What the answers would have cost without any cache.
    sum(billed_nano_usd) AS billed_nano_usd, -- [nano-USD] What they cost.
    sum(saved_by_cache_nano_usd) AS saved_by_cache_nano_usd, -- [nano-USD] What the answer cache saved.
    sum(list_nano_usd - billed_nano_usd - coalesce(saved_by_cache_nano_usd, 0)) AS saved_by_prefix_nano_usd, -- [nano-USD] What is left of list over billed: prefix caches.
    sum(cached_read_tokens) AS cached_read_tokens -- [tokens] Read from prefix caches.
FROM outcomes
GROUP BY date, tenant
