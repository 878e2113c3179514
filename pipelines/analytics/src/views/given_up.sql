-- One row a record that a step gave up, each time that it did. A letter is written again where a process died between writing it and
-- saying so; then `dead_letters` has it twice, and this view once. A copy that was written on another day counts on that day too.
SELECT
    date, -- The day of `died_at` in UTC.
    tenant, -- Whose request it was.
    letter, -- The key of the letter: step, topic, partition and offset of what was given up.
    redrives, -- [redrives] How often this record had been redriven at this step.
    first_value(request_id ORDER BY died_at) AS request_id, -- The request's id; derived where the record did not say.
    first_value(stage ORDER BY died_at) AS stage, -- The step that gave up.
    first_value(pipeline ORDER BY died_at) AS pipeline, -- The pipeline of that step.
    first_value(class ORDER BY died_at) AS class, -- undecodable, rejected, unavailable or panicked.
    first_value(code ORDER BY died_at) AS code, -- A word of a closed vocabulary.
    first_value(message ORDER BY died_at) AS message, -- What happened.
    min(died_at) AS died_at -- When the letter was written first.
FROM dead_letters
GROUP BY date, tenant, letter, redrives
