-- How far each job has come, day by day, and what it cost: of the requests that name a job, those that have ended. Bound it by `date`; a job
-- of several days has a line for each.
SELECT
    date, -- The day of `ended_at` in UTC.
    tenant, -- Whose job it is.
    job, -- The job that the requests named.
    min(accepted_at) AS first_accepted_at, -- [µs since 1970] When the first of them was written to its topic.
    max(ended_at) AS last_ended_at, -- [µs since 1970] When the last of them ended.
    count(*) AS requests, -- [requests] How many ended.
    count(*) FILTER (WHERE status = 'answered') AS answered, -- [requests] Of these, how many were answered.
    count(*) FILTER (WHERE status = 'failed') AS failed, -- [requests] Of these, how many failed; given_up has their dead letters.
    count(*) FILTER (WHERE status = 'expired') AS expired, -- [requests] Of these, how many were too late.
    count(*) FILTER (WHERE cache_status = 'hit') AS hits, -- [requests] Of these, how many the answer cache answered.
    sum(attempts) AS calls, -- [calls] Upstream calls made for them.
    sum(input_tokens) AS input_tokens, -- [tokens] Read by models.
    sum(output_tokens) AS output_tokens, -- [tokens] Written by models.
    sum(billed_nano_usd) AS billed_nano_usd, -- [nano-USD] What they cost.
    count(*) FILTER (WHERE model_served IS NOT NULL AND billed_nano_usd IS NULL) AS unpriced -- [requests] Those whose model has no price; their cost is missing.
FROM outcomes
WHERE job IS NOT NULL
GROUP BY date, tenant, job
