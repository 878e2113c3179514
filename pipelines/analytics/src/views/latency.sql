-- How long answers took, by percentile: exact to 100 answers, within 1% beyond. Only what was answered counts: what failed at once
-- was not fast. For a week call pctl_merge on outcomes_hourly; percentiles of days cannot be averaged.
SELECT
    date, -- The day of `ended_at` in UTC.
    tenant, -- Whose requests they were.
    lane, -- `interactive` or `backfill`.
    model_served AS model, -- The model that answered, or that the answer cache had the answer from; null where none did.
    cache_status, -- hit, miss or bypass.
    sum(requests) AS answered, -- [requests] How many.
    pctl_merge(total_us_state, 0.5) AS total_p50_us, -- [µs] From accepted to ended: half took no longer.
    pctl_merge(total_us_state, 0.95) AS total_p95_us, -- [µs] The same of 95%.
    pctl_merge(total_us_state, 0.99) AS total_p99_us, -- [µs] The same of 99%.
    pctl_merge(ttft_us_state, 0.5) AS ttft_p50_us, -- [µs] Time to first token; null unless streamed.
    pctl_merge(ttft_us_state, 0.99) AS ttft_p99_us, -- [µs] The same of 99%.
    pctl_merge(queue_us_state, 0.99) AS queue_p99_us, -- [µs] Waiting on topics.
    pctl_merge(infer_us_state, 0.99) AS infer_p99_us, -- [µs] Inference, its retries included.
    pctl_merge(tokens_per_second_state, 0.5) AS tokens_per_second_p50 -- [tokens/s] Written, over the time of inference.
FROM outcomes_hourly
WHERE status = 'answered'
GROUP BY date, tenant, lane, model_served, cache_status
