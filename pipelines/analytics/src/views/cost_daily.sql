-- What each day cost each tenant: what its requests were billed, and beside it what was spent on all upstream calls, also on
-- those that failed, lost a hedge or were made again. Both are in nano-USD; usd(x) shows dollars.
SELECT
    date, -- The day in UTC: of `ended_at` for requests, of `started_at` for calls.
    tenant, -- Whose requests they were.
    sum(request) AS requests, -- [requests] How many ended.
    sum(answered) AS answered, -- [requests] Of these, how many were answered.
    sum(unpriced) AS unpriced, -- [requests] Of these, how many a model answered that has no price; their cost is missing below.
    sum(input) AS input_tokens, -- [tokens] Read by models for what was answered.
    sum(output) AS output_tokens, -- [tokens] Written by models for what was answered.
    sum(billed) AS billed_nano_usd, -- [nano-USD] What the requests cost.
    sum(list) AS list_nano_usd, -- [nano-USD] What they would have cost without any cache.
    sum(saved) AS saved_by_cache_nano_usd, -- [nano-USD] What the answer cache saved.
    sum(call) AS calls, -- [calls] Upstream calls that were sent.
    sum(spent) AS calls_nano_usd -- [nano-USD] What these calls cost, wasted ones included.
FROM (
  SELECT
      date, tenant, requests AS request, CASE WHEN status = 'answered' THEN requests ELSE 0 END AS answered,
      CASE WHEN model_served IS NOT NULL AND NOT is_priced THEN requests ELSE 0 END AS unpriced,
      input_tokens AS input, output_tokens AS output, billed_nano_usd AS billed, list_nano_usd AS list,
      saved_by_cache_nano_usd AS saved, 0 AS call, CAST(NULL AS BIGINT) AS spent
  FROM outcomes_hourly
  UNION ALL
  SELECT
      date, tenant, 0, 0, 0, CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS BIGINT),
      CAST(NULL AS BIGINT), calls, cost_nano_usd
  FROM attempts_hourly
)
GROUP BY date, tenant
