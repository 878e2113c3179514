-- What each model cost each tenant on each day, for what was answered.
SELECT
    date, -- The day of `ended_at` in UTC.
    tenant, -- Whose requests they were.
    coalesce(model_served, model_requested) AS model, -- The model that answered, else the one that was wanted.
    sum(requests) AS requests, -- [requests] How many ended.
    sum(input_tokens) AS input_tokens, -- [tokens] Read by the model, from its prefix cache included.
    sum(cached_read_tokens) AS cached_read_tokens, -- [tokens] Of these, from the provider's prefix cache.
    sum(output_tokens) AS output_tokens, -- [tokens] Written by the model.
    sum(billed_nano_usd) AS billed_nano_usd, -- [nano-USD] What the requests cost.
    cost_per_1k(rated_nano_usd, rated_tokens) AS usd_per_1k_tokens -- [USD] For a thousand tokens, read or written.
FROM outcomes_hourly
GROUP BY date, tenant, coalesce(model_served, model_requested)
