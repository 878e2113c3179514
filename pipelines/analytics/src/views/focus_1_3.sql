-- What models cost, in the columns of the FinOps Open Cost and Usage Specification 1.3 (Cost and Usage): a row a day, tenant, provider and
-- model. There is no invoice here: it says what was used at the prices of the table, and a bill says what was paid. What has no price
-- is no charge and is left out; cost_daily counts it as unpriced.
SELECT
    usd(sum(billed_nano_usd)) AS "BilledCost", -- [USD] What the requests cost.
    tenant AS "BillingAccountId", -- The tenant.
    tenant AS "BillingAccountName", -- The tenant.
    'USD' AS "BillingCurrency", -- Always USD.
    date_trunc('month', date) + INTERVAL '1 month' AS "BillingPeriodEnd", -- The first moment of the next month in UTC.
    date_trunc('month', date) AS "BillingPeriodStart", -- The first moment of the month in UTC.
    'Usage' AS "ChargeCategory", -- Always Usage.
    CAST(NULL AS VARCHAR) AS "ChargeClass", -- Null: nothing here corrects an earlier period.
    concat('Tokens of ', coalesce(model_served, 'no model')) AS "ChargeDescription", -- What was used.
    'Usage-Based' AS "ChargeFrequency", -- Always Usage-Based.
    CAST(date AS TIMESTAMP) + INTERVAL '1 day' AS "ChargePeriodEnd", -- The first moment of the next day in UTC.
    CAST(date AS TIMESTAMP) AS "ChargePeriodStart", -- The first moment of the day in UTC.
    coalesce(sum(input_tokens), 0) + coalesce(sum(output_tokens), 0) AS "ConsumedQuantity", -- [tokens] Read and written.
    'Tokens' AS "ConsumedUnit", -- Always Tokens.
    usd(sum(billed_nano_usd)) AS "ContractedCost", -- [USD] As billed: the table of prices holds what was agreed.
    usd(sum(billed_nano_usd)) AS "EffectiveCost", -- [USD] As billed: nothing is paid ahead.
    coalesce(provider, 'Not Applicable') AS "HostProviderName", -- Who served the model.
    coalesce(provider, 'Not Applicable') AS "InvoiceIssuerName", -- Who served the model, and sends the bill.
    usd(sum(list_nano_usd)) AS "ListCost", -- [USD] What the answers would have cost without any cache.
    coalesce(sum(input_tokens), 0) + coalesce(sum(output_tokens), 0) AS "PricingQuantity", -- [tokens] Read and written.
    'Tokens' AS "PricingUnit", -- Always Tokens.
    coalesce(provider, 'Not Applicable') AS "ProviderName", -- As ServiceProviderName, which took its place in 1.3.
    coalesce(provider, 'Not Applicable') AS "PublisherName", -- As ServiceProviderName.
    model_served AS "ResourceId", -- The model that answered, or that the answer cache had the answer from; null where none did.
    'AI and Machine Learning' AS "ServiceCategory", -- Always AI and Machine Learning.
    coalesce(model_served, 'Not Applicable') AS "ServiceName", -- The model that answered.
    coalesce(provider, 'Not Applicable') AS "ServiceProviderName", -- Who served the model.
    'Generative AI' AS "ServiceSubcategory", -- Always Generative AI.
    tenant AS "SubAccountId", -- The tenant.
    date AS "x_Date", -- The day, for a bound on time.
    sum(requests) AS "x_Requests" -- [requests] How many ended.
FROM outcomes_hourly
WHERE is_priced
GROUP BY date, tenant, provider, model_served
