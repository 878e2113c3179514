-- What is being spent, minute by minute, on all upstream calls: for whoever asks now. Bound it by `date`.
SELECT
    date, -- The day of `started_at` in UTC.
    date_trunc('minute', started_at) AS minute, -- The minute in UTC in which the calls were sent.
    tenant, -- Whose requests they were for.
    provider, -- The kind of provider.
    model, -- The model that was asked for.
    count(*) AS calls, -- [calls] How many were sent.
    count(*) FILTER (WHERE status <> 'ok') AS not_ok, -- [calls] Of these, those with a status other than ok.
    sum(input_tokens) AS input_tokens, -- [tokens] Read by the model.
    sum(output_tokens) AS output_tokens, -- [tokens] Written by the model.
    sum(cost_nano_usd) AS cost_nano_usd -- [nano-USD] What the calls cost.
FROM attempts
GROUP BY date, date_trunc('minute', started_at), tenant, provider, model
