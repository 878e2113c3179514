//! The rates that many processes share: in Redis, one script for all that is told and asked, since Redis runs one script at a
//! time.
//!
//! A rate is a hash: what was taken in each second (`1:{second}` of requests, `2:{second}` of tokens), what a provider said
//! (`level`, `full`, `rate`, `at`, `heard`, each with the number of its measure), and `paused`. Who shares is a sorted set of
//! all by when they asked last. Time is the server's.

use super::{
    AMOUNT_MAX, Ask, COUNTS_S, HEARD_MS, KEEP_MS, PART, Rates, SHARES_MS, Slice, UNCOUNTED_S, WAIT_MS_MIN,
    check,
};
use crate::Answer;
use crate::key_value::Redis;
use futures::FutureExt;
use redis::Script;
use std::sync::LazyLock;
use std::time::Duration;

/// The numbers of the port, then the script, whose arguments are who shares, the length of the pause in ms, and for each
/// measure limit, need, want, beyond, and level, full, what refills and ms to the reset of what was heard (-1 where there is
/// none); then second, requests and tokens of all that is given back.
///
/// Answers requests, tokens, second, whether anything is limited, ms to wait, ms to pause, and how many share.
static TAKE: LazyLock<Script> = LazyLock::new(|| {
    let numbers = format!(
        "local COUNTS, HEARD, PART, SHARES, KEEP, WAIT, UNCOUNTED = {COUNTS_S}, {HEARD_MS}, {PART}, {SHARES_MS}, {KEEP_MS}, {WAIT_MS_MIN}, {UNCOUNTED_S}"
    );
    Script::new(&format!("{numbers}\n{SCRIPT}"))
});

const SCRIPT: &str = r"
local rate, sharers = KEYS[1], KEYS[2]
local time = redis.call('TIME')
local second = tonumber(time[1])
local now = second * 1000 + math.floor(time[2] / 1000)

redis.call('ZADD', sharers, now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', sharers, '-inf', now - SHARES)
redis.call('PEXPIRE', sharers, KEEP)

local taken, sum, said = {{}, {}}, {0, 0}, {}
local all = redis.call('HGETALL', rate)
for i = 1, #all, 2 do
    local measure, of = string.match(all[i], '^([12]):(%d+)$')
    if not measure then
        said[all[i]] = tonumber(all[i + 1])
    elseif tonumber(of) + COUNTS <= second then
        redis.call('HDEL', rate, all[i])
    else
        measure = tonumber(measure)
        taken[measure][tonumber(of)] = tonumber(all[i + 1])
        sum[measure] = sum[measure] + all[i + 1]
    end
end

local buckets = {}
for measure = 1, 2 do
    if said['heard' .. measure] and now - said['heard' .. measure] <= HEARD then
        local full, per_ms = said['full' .. measure], said['rate' .. measure]
        local level = said['level' .. measure] + per_ms * (now - said['at' .. measure])
        buckets[measure] = {level = math.min(level, full), full = full, per_ms = per_ms, heard = said['heard' .. measure]}
    end
end

local function add(measure, of, amount)
    if amount == 0 then return end
    local before = taken[measure][of] or 0
    if amount < 0 then amount = -math.min(-amount, before) end
    taken[measure][of] = before + amount
    sum[measure] = sum[measure] + amount
    redis.call('HSET', rate, measure .. ':' .. of, string.format('%.0f', before + amount))
    local bucket = buckets[measure]
    if bucket then bucket.level = math.min(bucket.level - amount, bucket.full) end
end

for i = 19, #ARGV, 3 do
    for measure = 1, 2 do
        local of = tonumber(ARGV[i])
        if taken[measure][of] then add(measure, of, -ARGV[i + measure]) end
    end
end
for measure = 1, 2 do
    local at = 3 + (measure - 1) * 8
    add(measure, second, tonumber(ARGV[at + 3]))
    local level, full = tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5])
    if level >= 0 then
        local per_ms = ARGV[at + 6] / math.max(tonumber(ARGV[at + 7]), 1)
        for of = second - UNCOUNTED, second do level = level - (taken[measure][of] or 0) end
        buckets[measure] = {level = level, full = full, per_ms = per_ms, heard = now}
    end
end

local paused = math.max(said.paused or 0, now + ARGV[2])
if paused > now then redis.call('HSET', rate, 'paused', paused) end

local limited, wait, amount = 0, 0, {0, 0}
for measure = 1, 2 do
    local at = 3 + (measure - 1) * 8
    local limit, need, want = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
    local left, bucket, wait_here = want * PART, buckets[measure], 0
    if limit >= 0 then
        limited = 1
        local rest = math.max(limit - sum[measure], 0)
        left = math.min(left, rest)
        if rest < need and sum[measure] > 0 then
            local oldest
            for of, some in pairs(taken[measure]) do
                if some > 0 and (not oldest or of < oldest) then oldest = of end
            end
            wait_here = math.max((oldest + COUNTS) * 1000 - now, WAIT)
        end
    end
    if bucket then
        limited = 1
        left = math.min(left, math.max(math.floor(bucket.level), 0))
        local missing = math.min(need, bucket.full) - bucket.level
        if missing > 0 then
            local refilled = bucket.per_ms > 0 and math.ceil(missing / bucket.per_ms) or HEARD
            wait_here = math.min(math.max(wait_here, refilled, WAIT), HEARD)
        end
    end
    wait = math.max(wait, wait_here)
    amount[measure] = math.max(math.min(want, math.floor(left / PART)), need)
end
if ARGV[4] == '0' or paused > now then
    amount, wait = {0, 0}, 0
elseif wait > 0 then
    amount = {0, 0}
end
for measure = 1, 2 do
    add(measure, second, amount[measure])
    local bucket = buckets[measure]
    if bucket then
        redis.call('HSET', rate, 'level' .. measure, string.format('%.6f', bucket.level), 'full' .. measure, bucket.full,
            'rate' .. measure, string.format('%.9f', bucket.per_ms), 'at' .. measure, now, 'heard' .. measure, bucket.heard)
    end
end
redis.call('PEXPIRE', rate, KEEP)
return {amount[1], amount[2], second, limited, wait, math.max(paused - now, 0), redis.call('ZCARD', sharers)}
";

impl Rates for Redis {
    fn take<'a>(&'a self, name: &'a str, sharer: &'a str, ask: &'a Ask) -> Answer<'a, Slice> {
        async move {
            check(name, sharer, ask)?;
            let mut call = TAKE.prepare_invoke();
            call.key(self.key(&format!("rate:{name}"))).key(self.key("sharers"));
            call.arg(sharer).arg(millis(ask.pause.unwrap_or_default()));
            let limits = ask.limits.array().into_iter().zip(ask.need.array()).zip(ask.want.array());
            for (((limit, need), want), (beyond, heard)) in
                limits.zip(ask.beyond.array().into_iter().zip(ask.heard.array()))
            {
                match limit {
                    Some(limit) => call.arg(limit.min(AMOUNT_MAX)),
                    None => call.arg(-1),
                };
                call.arg(need.min(AMOUNT_MAX)).arg(want.min(AMOUNT_MAX)).arg(beyond.min(AMOUNT_MAX));
                match heard {
                    Some(heard) => call
                        .arg(heard.level.min(AMOUNT_MAX))
                        .arg(heard.full.min(AMOUNT_MAX))
                        .arg(heard.refills.min(AMOUNT_MAX))
                        .arg(millis(heard.reset)),
                    None => call.arg(-1).arg(-1).arg(-1).arg(-1),
                };
            }
            for back in &ask.back {
                call.arg(back.second).arg(back.amount.requests).arg(back.amount.tokens);
            }
            let (requests, tokens, second, limited, wait_ms, pause_ms, sharers): (
                u64,
                u64,
                u64,
                u8,
                u64,
                u64,
                u64,
            ) = self.run(&call).await?;
            let some = |ms| (ms > 0).then(|| Duration::from_millis(ms));
            Ok(Slice {
                amount: [requests, tokens].into(),
                second,
                is_limited: limited == 1,
                wait: some(wait_ms),
                pause: some(pause_ms),
                sharers,
            })
        }
        .boxed()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).min(AMOUNT_MAX)
}
