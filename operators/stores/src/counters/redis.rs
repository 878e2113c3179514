//! The counters that many processes share: in Redis, a script for each change, since Redis runs one script at a time.
//!
//! A counter is a hash of what is used (`u`) and held (`h`), beside a sorted set of its holds by their ends. A group is a sorted
//! set of its counters by when they are forgotten. Time is the server's, so processes need not agree on it.

use super::{Counters, GROUP_MAX, Hold, Line, OVERTAKEN, check};
use crate::Answer;
use crate::clock::ttl_ms;
use crate::key_value::Redis;
use futures::FutureExt;
use redis::{Script, ScriptInvocation};
use std::sync::LazyLock;
use std::time::Duration;

/// Arguments: id, length of the hold in ms, then amount, limit, ms to keep and the most counters of its group (0: it has none)
/// for each line. Answers the line that is over, from 1, and what is counted there; or 0; or less, the line that is too many.
static HOLD: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local time = redis.call('TIME')
        local now = time[1] * 1000 + math.floor(time[2] / 1000)
        local lines = #KEYS / 3
        for i = 1, lines do
            local counter, holds, group, most = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i], tonumber(ARGV[4 * i + 2])
            if redis.call('ZSCORE', holds, '0:' .. ARGV[1]) then return {0, 0} end
            if most > 0 and redis.call('EXISTS', counter) == 0 then
                redis.call('ZREMRANGEBYSCORE', group, '-inf', now)
                if redis.call('ZCARD', group) >= most then return {-i, 0} end
            end
            for _, hold in ipairs(redis.call('ZRANGEBYSCORE', holds, '-inf', now)) do
                redis.call('HINCRBY', counter, 'h', '-' .. string.match(hold, '^%d+'))
                redis.call('ZREM', holds, hold)
            end
            local counted = (redis.call('HGET', counter, 'u') or 0) + (redis.call('HGET', counter, 'h') or 0)
            if counted > ARGV[4 * i] - ARGV[4 * i - 1] then return {i, counted} end
        end
        for i = 1, lines do
            local counter, holds, group = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i]
            local amount, keep = ARGV[4 * i - 1], ARGV[4 * i + 1]
            redis.call('HINCRBY', counter, 'h', amount)
            redis.call('ZADD', holds, now + ARGV[2], amount .. ':' .. ARGV[1])
            redis.call('PEXPIRE', counter, keep)
            redis.call('PEXPIRE', holds, keep)
            if tonumber(ARGV[4 * i + 2]) > 0 then
                redis.call('ZADD', group, now + keep, counter)
                redis.call('PEXPIRE', group, keep)
            end
        end
        return {0, 0}
        ",
    )
});

/// Arguments: id, ms to remember it for a hold that comes after it, then what was held, what was used and ms to keep for each
/// line. Such a hold finds one of 0 in its place.
static SETTLE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local time = redis.call('TIME')
        local now = time[1] * 1000 + math.floor(time[2] / 1000)
        for i = 1, #KEYS / 2 do
            local counter, holds = KEYS[2 * i - 1], KEYS[2 * i]
            local held, used, keep = ARGV[3 * i], ARGV[3 * i + 1], ARGV[3 * i + 2]
            if redis.call('ZREM', holds, held .. ':' .. ARGV[1]) == 1 then
                redis.call('HINCRBY', counter, 'h', '-' .. held)
            else
                redis.call('ZADD', holds, now + ARGV[2], '0:' .. ARGV[1])
            end
            if used ~= '0' then redis.call('HINCRBY', counter, 'u', used) end
            redis.call('PEXPIRE', counter, keep)
            redis.call('PEXPIRE', holds, keep)
        end
        ",
    )
});

fn keys(redis: &Redis, call: &mut ScriptInvocation<'_>, line: &Line) {
    call.key(redis.key(&format!("counter:{}", line.name)));
    call.key(redis.key(&format!("holds:{}", line.name)));
}

impl Counters for Redis {
    fn hold<'a>(&'a self, id: &'a str, lines: &'a [Line], time: Duration) -> Answer<'a, Hold> {
        async move {
            check(id, lines)?;
            let mut call = HOLD.prepare_invoke();
            call.arg(id).arg(ttl_ms(time));
            for line in lines {
                keys(self, &mut call, line);
                call.key(self.key(&format!("group:{}", line.group.as_deref().unwrap_or_default())));
                let most = line.group.as_ref().map_or(0, |_| GROUP_MAX);
                call.arg(line.amount).arg(line.limit.min(super::AMOUNT_MAX)).arg(ttl_ms(line.keep)).arg(most);
            }
            let (refused, counted): (i64, u64) = self.run(&call).await?;
            let line = usize::try_from(refused.unsigned_abs()).ok().and_then(|line| line.checked_sub(1));
            Ok(line.map_or(Hold::Taken, |line| match refused < 0 {
                true => Hold::Full { line },
                false => Hold::Over { line, counted },
            }))
        }
        .boxed()
    }

    fn settle<'a>(&'a self, id: &'a str, lines: &'a [Line], used: &'a [u64]) -> Answer<'a, ()> {
        async move {
            check(id, lines)?;
            let mut call = SETTLE.prepare_invoke();
            call.arg(id).arg(ttl_ms(OVERTAKEN));
            for (line, used) in lines.iter().zip(used) {
                keys(self, &mut call, line);
                call.arg(line.amount).arg(*used).arg(ttl_ms(line.keep));
            }
            self.run(&call).await
        }
        .boxed()
    }
}
