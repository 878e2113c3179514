-- How long answers took, by percentile. Only what was answered counts: what failed at once was not fast.
SELECT
    date, -- The day of `ended_at` in UTC.
    tenant, -- Whose requests they were.
    lane, -- `interactive` or `backfill`.
    model_served AS model, -- The model that answered; null where the answer cache did.
    cache_status, -- hit, miss or bypass.
    count(*) AS answered, -- [requests] How many.
    pctl(total_us, 0.5) AS total_p50_us, -- [µs] From accepted to ended: half took no longer.
    pctl(total_us, 0.95) AS total_p95_us, -- [µs] The same of 95%.
    pctl(total_us, 0.99) AS total_p99_us, -- [µs] The same of 99%.
    pctl(ttft_us, 0.5) AS ttft_p50_us, -- [µs] Time to first token; null unless streamed.
    pctl(ttft_us, 0.99) AS ttft_p99_us, -- [µs] The same of 99%.
    pctl(queue_us, 0.99) AS queue_p99_us, -- [µs] Waiting on topics.
    pctl(infer_us, 0.99) AS infer_p99_us, -- [µs] Inference, its retries included.
    pctl(tps(output_tokens, infer_us), 0.5) AS tokens_per_second_p50 -- [tokens/s] Written, over the time of inference.
FROM outcomes
WHERE status = 'answered'
GROUP BY date, tenant, lane, model_served, cache_status
