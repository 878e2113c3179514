-- One row a judge and answer, with what a person said of the answer, if anybody did: what hallucination_rate is called on. A
-- verdict that was sent again counts once, and the last label of an answer holds.
SELECT
    a.date, -- The day of `audited_at` in UTC.
    a.tenant, -- Whose request it was.
    a.request_id, -- The request's id.
    a.generation, -- [redrives] Counts redrives of the request.
    a.judge, -- Who judged.
    a.judge_version, -- Its version; another version is another judge.
    a.stratum, -- What the answer was drawn from.
    a.flagged, -- Whether the judge holds the answer to be wrong.
    l.wrong AS label, -- Whether a person does; null where nobody looked.
    a.inclusion_probability * coalesce(l.inclusion_probability, 1.0) AS inclusion_probability -- The chance to be judged, times that to be labelled where it was; labels must be drawn with one chance from what has none.
FROM (
  SELECT
      date, tenant, request_id, generation, judge, judge_version,
      last_value(stratum ORDER BY audited_at) AS stratum,
      last_value(flagged ORDER BY audited_at) AS flagged,
      coalesce(last_value(inclusion_probability ORDER BY audited_at), 1.0) AS inclusion_probability
  FROM audits
  GROUP BY date, tenant, request_id, generation, judge, judge_version
) AS a
LEFT JOIN (
  SELECT
      tenant, request_id, generation,
      last_value(wrong ORDER BY labelled_at) AS wrong,
      last_value(inclusion_probability ORDER BY labelled_at) AS inclusion_probability
  FROM labels
  GROUP BY tenant, request_id, generation
) AS l ON a.tenant = l.tenant AND a.request_id = l.request_id AND a.generation = l.generation
