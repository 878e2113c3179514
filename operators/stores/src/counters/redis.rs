//! The counters that many processes share: in Redis, a script for each change, since Redis runs one script at a time.
//!
//! A counter is a hash of what is used (`u`) and held (`h`) and of how often there was no room (`r`), beside a sorted set of its holds
//! by their ends. A group is a sorted set of its counters by when they are forgotten, and a list one of their names. Time is the server's, so processes need not agree on it.

use super::{Counted, Counters, GROUP_MAX, Hold, LIST_MAX, Line, OVERTAKEN, PAGE_MAX, check};
use crate::Answer;
use crate::clock::ttl_ms;
use crate::key_value::Redis;
use futures::FutureExt;
use redis::{Script, ScriptInvocation};
use std::sync::LazyLock;
use std::time::Duration;

/// Arguments: id, length of the hold in ms, the most counters of a list, then amount, limit, ms to keep, the most counters of its group
/// (0: it has none) and its name in its list (empty: it has none) for each line. Answers the line that is over, from 1, and what is counted there; or 0; or less, the line that is too many.
static HOLD: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local time = redis.call('TIME')
        local now = time[1] * 1000 + math.floor(time[2] / 1000)
        local lines = #KEYS / 4
        for i = 1, lines do
            local counter, holds, group = KEYS[4 * i - 3], KEYS[4 * i - 2], KEYS[4 * i - 1]
            local amount, limit, most = ARGV[5 * i - 1], ARGV[5 * i], tonumber(ARGV[5 * i + 2])
            if redis.call('ZSCORE', holds, '0:' .. ARGV[1]) then return {0, 0} end
            local exists = redis.call('EXISTS', counter) == 1
            if most > 0 and not exists then
                redis.call('ZREMRANGEBYSCORE', group, '-inf', now)
                if redis.call('ZCARD', group) >= most then return {-i, 0} end
            end
            for _, hold in ipairs(redis.call('ZRANGEBYSCORE', holds, '-inf', now)) do
                redis.call('HINCRBY', counter, 'h', '-' .. string.match(hold, '^%d+'))
                redis.call('ZREM', holds, hold)
            end
            local counted = (redis.call('HGET', counter, 'u') or 0) + (redis.call('HGET', counter, 'h') or 0)
            if counted > limit - amount then
                if exists then redis.call('HINCRBY', counter, 'r', 1) end
                return {i, counted}
            end
        end
        for i = 1, lines do
            local counter, holds, group, list = KEYS[4 * i - 3], KEYS[4 * i - 2], KEYS[4 * i - 1], KEYS[4 * i]
            local amount, keep, name = ARGV[5 * i - 1], ARGV[5 * i + 1], ARGV[5 * i + 3]
            redis.call('HINCRBY', counter, 'h', amount)
            redis.call('ZADD', holds, now + ARGV[2], amount .. ':' .. ARGV[1])
            redis.call('PEXPIRE', counter, keep)
            redis.call('PEXPIRE', holds, keep)
            if tonumber(ARGV[5 * i + 2]) > 0 then
                redis.call('ZADD', group, now + keep, counter)
                redis.call('PEXPIRE', group, keep)
            end
            if name ~= '' then
                if redis.call('ZCARD', list) < tonumber(ARGV[3]) then redis.call('ZADD', list, 0, name) end
                redis.call('PEXPIRE', list, keep)
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

/// Arguments: what stands before the names of counters and of their holds, the name behind which to begin, and how many may come. What
/// ran out is not counted as held; it is taken off by the next hold.
static LISTED: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local time = redis.call('TIME')
        local now = time[1] * 1000 + math.floor(time[2] / 1000)
        local after = '-'
        if ARGV[3] ~= '' then after = '(' .. ARGV[3] end
        local listed = {}
        for _, name in ipairs(redis.call('ZRANGEBYLEX', KEYS[1], after, '+', 'LIMIT', 0, ARGV[4])) do
            local counter = redis.call('HMGET', ARGV[1] .. name, 'u', 'h', 'r')
            local held = tonumber(counter[2] or 0)
            for _, hold in ipairs(redis.call('ZRANGEBYSCORE', ARGV[2] .. name, '-inf', now)) do
                held = held - string.match(hold, '^%d+')
            end
            listed[#listed + 1] = {name, counter[1] or 0, held, counter[3] or 0}
        end
        return listed
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
            call.arg(id).arg(ttl_ms(time)).arg(LIST_MAX);
            for line in lines {
                keys(self, &mut call, line);
                call.key(self.key(&format!("group:{}", line.group.as_deref().unwrap_or_default())));
                call.key(self.key(&format!("list:{}", line.list.as_deref().unwrap_or_default())));
                let most = line.group.as_ref().map_or(0, |_| GROUP_MAX);
                call.arg(line.amount).arg(line.limit.min(super::AMOUNT_MAX)).arg(ttl_ms(line.keep)).arg(most);
                call.arg(line.list.as_ref().map_or("", |_| &line.name));
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

    fn listed<'a>(&'a self, list: &'a str, after: &'a str) -> Answer<'a, Vec<Counted>> {
        async move {
            let mut call = LISTED.prepare_invoke();
            call.key(self.key(&format!("list:{list}")));
            call.arg(self.key("counter:")).arg(self.key("holds:")).arg(after).arg(PAGE_MAX);
            let listed: Vec<(String, u64, u64, u64)> = self.run(&call).await?;
            let counted = |(name, used, held, refused)| Counted { name, used, held, refused };
            Ok(listed.into_iter().map(counted).collect())
        }
        .boxed()
    }
}
