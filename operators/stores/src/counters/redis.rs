//! The counters that many processes share: in Redis, a script for each change, since Redis runs one script at a time.
//!
//! A counter is a hash of what is used (`u`) and held (`h`), beside a sorted set of its holds by their ends. Time is the
//! server's, so processes need not agree on it.

use super::{Counters, Hold, Line, check};
use crate::Answer;
use crate::clock::ttl_ms;
use crate::key_value::Redis;
use futures::FutureExt;
use redis::{Script, ScriptInvocation};
use std::sync::LazyLock;
use std::time::Duration;

/// Arguments: id, length of the hold in ms, then amount, limit and ms to keep for each line.
/// Answers the line that is over, from 1, and what is counted there; or 0.
static HOLD: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local time = redis.call('TIME')
        local now = time[1] * 1000 + math.floor(time[2] / 1000)
        local lines = #KEYS / 2
        for i = 1, lines do
            local counter, holds = KEYS[2 * i - 1], KEYS[2 * i]
            for _, hold in ipairs(redis.call('ZRANGEBYSCORE', holds, '-inf', now)) do
                redis.call('HINCRBY', counter, 'h', '-' .. string.match(hold, '^%d+'))
                redis.call('ZREM', holds, hold)
            end
            local counted = (redis.call('HGET', counter, 'u') or 0) + (redis.call('HGET', counter, 'h') or 0)
            if counted > ARGV[3 * i + 1] - ARGV[3 * i] then return {i, counted} end
        end
        for i = 1, lines do
            local counter, holds = KEYS[2 * i - 1], KEYS[2 * i]
            redis.call('HINCRBY', counter, 'h', ARGV[3 * i])
            redis.call('ZADD', holds, now + ARGV[2], ARGV[3 * i] .. ':' .. ARGV[1])
            redis.call('PEXPIRE', counter, ARGV[3 * i + 2])
            redis.call('PEXPIRE', holds, ARGV[3 * i + 2])
        end
        return {0, 0}
        ",
    )
});

/// Arguments: id, then what was held, what was used and ms to keep for each line.
static SETTLE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        for i = 1, #KEYS / 2 do
            local counter, holds = KEYS[2 * i - 1], KEYS[2 * i]
            local held, used, keep = ARGV[3 * i - 1], ARGV[3 * i], ARGV[3 * i + 1]
            if redis.call('ZREM', holds, held .. ':' .. ARGV[1]) == 1 then
                redis.call('HINCRBY', counter, 'h', '-' .. held)
            end
            redis.call('HINCRBY', counter, 'u', used)
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
                call.arg(line.amount).arg(line.limit.min(super::AMOUNT_MAX)).arg(ttl_ms(line.keep));
            }
            let (over, counted): (usize, u64) = self.run(&call).await?;
            Ok(over.checked_sub(1).map_or(Hold::Taken, |line| Hold::Over { line, counted }))
        }
        .boxed()
    }

    fn settle<'a>(&'a self, id: &'a str, lines: &'a [Line], used: &'a [u64]) -> Answer<'a, ()> {
        async move {
            check(id, lines)?;
            let mut call = SETTLE.prepare_invoke();
            call.arg(id);
            for (line, used) in lines.iter().zip(used) {
                keys(self, &mut call, line);
                call.arg(line.amount).arg(*used).arg(ttl_ms(line.keep));
            }
            self.run(&call).await
        }
        .boxed()
    }
}
