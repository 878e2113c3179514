-- How often answers were wrong, by judge and version, with what is honestly known of it. For months or models call
-- hallucination_rate on judged; days cannot be averaged.
SELECT
    date, -- The day of `audited_at` in UTC.
    tenant, -- Whose answers they were.
    judge, -- Who judged.
    judge_version, -- Its version.
    r['rate'] AS rate, -- The share of wrong answers, from 0 to 1; null without labels.
    r['low'] AS low, -- The lower bound of its 95% interval.
    r['high'] AS high, -- The upper bound.
    r['method'] AS method, -- prediction_powered or labels_only.
    r['labelled'] AS labelled, -- [answers] Judged and labelled.
    r['judged'] AS judged, -- [answers] Judged.
    r['naive'] AS naive -- What the judge flags, from 0 to 1, which is not the rate.
FROM (
  SELECT date, tenant, judge, judge_version, hallucination_rate(flagged, label, inclusion_probability) AS r
  FROM judged
  GROUP BY date, tenant, judge, judge_version
)
