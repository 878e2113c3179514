//! The key-value store that many processes share: one Redis server, version 6 or later.
//!
//! Invariant: every key that this adapter touches begins with its prefix. What an acknowledged write survives is the
//! server's to say (`appendonly`, replicas); `flush` therefore has nothing to add. Not for Redis Cluster: `set_many`
//! is one transaction and its keys would lie on several nodes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, Cmd, ErrorKind, FromRedisValue, RedisError, Script, ScriptInvocation, ServerErrorKind};

use super::{KeyValue, check_entries, check_entry, check_key, check_keys};
use crate::clock::ttl_ms;
use crate::{Answer, Error};

/// Keys in one command: a longer one keeps the server, which has one thread, from everybody else.
const KEYS_PER_COMMAND_MAX: usize = 512;
/// Commands that wait for their answer; further ones wait for room.
const IN_FLIGHT_MAX: usize = 1024;

/// How a server is called.
#[derive(Clone, Debug)]
pub struct Options {
    /// Put before every key, so that one server can be shared.
    pub prefix: String,
    /// For making a connection.
    pub connect_timeout: Duration,
    /// For each command.
    pub response_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            prefix: "forebay:".to_owned(),
            connect_timeout: Duration::from_secs(2),
            response_timeout: Duration::from_secs(1),
        }
    }
}

/// A Redis server. One connection carries all commands, and is made again when it breaks.
pub struct Redis {
    connection: ConnectionManager,
    prefix: String,
    /// For errors: the address without credentials.
    what: String,
    delete_if: Script,
}

impl Redis {
    /// Connects to `url` (`redis://[user:password@]host:port[/database]`); a server that does not answer is an error now.
    pub async fn connect(url: &str, options: Options) -> Result<Self, Error> {
        let client = Client::open(url).map_err(|error| unavailable_or_refused("redis", error))?;
        let what = format!("redis at {}", client.get_connection_info().addr());
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(options.connect_timeout))
            .set_response_timeout(Some(options.response_timeout))
            .set_concurrency_limit(IN_FLIGHT_MAX)
            // Retries belong to the caller, who knows the deadline.
            .set_number_of_retries(0);
        let connection = ConnectionManager::new_with_config(client, config).await;
        let connection = connection.map_err(|error| unavailable_or_refused(&what, error))?;
        let delete_if = Script::new(
            "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('UNLINK', KEYS[1]) else return 0 end",
        );
        let this = Self { connection, prefix: options.prefix, what, delete_if };
        this.query::<()>(&redis::cmd("PING")).await?;
        Ok(this)
    }

    async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Error> {
        command.query_async(&mut self.connection.clone()).await.map_err(|error| self.error(error))
    }

    /// Runs a script, which is one step to everybody else.
    pub(crate) async fn run<T: FromRedisValue>(&self, script: &ScriptInvocation<'_>) -> Result<T, Error> {
        script.invoke_async(&mut self.connection.clone()).await.map_err(|error| self.error(error))
    }

    pub(crate) fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn set_command(&self, key: &str, value: &Bytes, ttl: Option<Duration>) -> Cmd {
        let mut command = redis::cmd("SET");
        command.arg(self.key(key)).arg(value.as_ref());
        if let Some(ttl) = ttl {
            command.arg("PX").arg(ttl_ms(ttl));
        }
        command
    }

    fn error(&self, error: RedisError) -> Error {
        unavailable_or_refused(&self.what, error)
    }
}

impl KeyValue for Redis {
    fn get(&self, key: &str) -> Answer<'_, Option<Bytes>> {
        let key = key.to_owned();
        async move {
            check_key(&key)?;
            self.query(redis::cmd("GET").arg(self.key(&key))).await
        }
        .boxed()
    }

    fn get_many(&self, keys: &[String]) -> Answer<'_, Vec<Option<Bytes>>> {
        let keys = keys.to_vec();
        async move {
            check_keys(&keys)?;
            let mut values = Vec::with_capacity(keys.len());
            for some in keys.chunks(KEYS_PER_COMMAND_MAX) {
                let mut command = redis::cmd("MGET");
                for key in some {
                    command.arg(self.key(key));
                }
                values.extend(self.query::<Vec<Option<Bytes>>>(&command).await?);
            }
            Ok(values)
        }
        .boxed()
    }

    fn set(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Answer<'_, ()> {
        let key = key.to_owned();
        async move {
            check_entry(&key, &value)?;
            self.query(&self.set_command(&key, &value, ttl)).await
        }
        .boxed()
    }

    fn set_if_absent(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Answer<'_, bool> {
        let key = key.to_owned();
        async move {
            check_entry(&key, &value)?;
            self.query(self.set_command(&key, &value, ttl).arg("NX")).await
        }
        .boxed()
    }

    fn delete(&self, key: &str) -> Answer<'_, bool> {
        let key = key.to_owned();
        async move {
            check_key(&key)?;
            self.query(redis::cmd("UNLINK").arg(self.key(&key))).await
        }
        .boxed()
    }

    fn delete_if(&self, key: &str, expected: &[u8]) -> Answer<'_, bool> {
        let (key, expected) = (key.to_owned(), expected.to_vec());
        async move {
            check_key(&key)?;
            let mut call = self.delete_if.key(self.key(&key));
            let done = call.arg(expected).invoke_async(&mut self.connection.clone()).await;
            done.map_err(|error| self.error(error))
        }
        .boxed()
    }

    fn set_many(&self, entries: Vec<(String, Option<Bytes>)>) -> Answer<'_, ()> {
        async move {
            check_entries(&entries)?;
            if entries.is_empty() {
                return Ok(());
            }
            let mut transaction = redis::pipe();
            transaction.atomic();
            for (key, value) in &entries {
                match value {
                    Some(value) => transaction.add_command(self.set_command(key, value, None)),
                    None => transaction.cmd("UNLINK").arg(self.key(key)),
                };
                transaction.ignore();
            }
            let done = transaction.query_async(&mut self.connection.clone()).await;
            done.map_err(|error| self.error(error))
        }
        .boxed()
    }

    fn clear(&self, prefix: &str) -> Answer<'_, u64> {
        let pattern = format!("{}*", glob_escaped(&self.key(prefix)));
        async move {
            let (mut cleared, mut cursor) = (0, 0u64);
            loop {
                let mut scan = redis::cmd("SCAN");
                scan.arg(cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(KEYS_PER_COMMAND_MAX);
                let (next, keys): (u64, Vec<Bytes>) = self.query(&scan).await?;
                for some in keys.chunks(KEYS_PER_COMMAND_MAX) {
                    let mut unlink = redis::cmd("UNLINK");
                    for key in some {
                        unlink.arg(key.as_ref());
                    }
                    cleared += self.query::<u64>(&unlink).await?;
                }
                cursor = next;
                if cursor == 0 {
                    return Ok(cleared);
                }
            }
        }
        .boxed()
    }

    fn flush(&self) -> Answer<'_, ()> {
        async { Ok(()) }.boxed()
    }
}

/// A prefix is meant as it is written, but SCAN reads a pattern.
fn glob_escaped(prefix: &str) -> String {
    let mut escaped = String::with_capacity(prefix.len());
    for character in prefix.chars() {
        if matches!(character, '*' | '?' | '[' | ']' | '\\' | '^') {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}

fn unavailable_or_refused(what: &str, error: RedisError) -> Error {
    let transient = match error.kind() {
        ErrorKind::Io => true,
        ErrorKind::Server(kind) => matches!(
            kind,
            // READONLY: a primary that has just been demoted.
            ServerErrorKind::BusyLoading
                | ServerErrorKind::TryAgain
                | ServerErrorKind::ClusterDown
                | ServerErrorKind::MasterDown
                | ServerErrorKind::ReadOnly
        ),
        // OOM: `maxmemory` reached under noeviction; it passes when entries expire.
        _ => matches!(error.code(), Some("OOM" | "BUSY")),
    };
    let (what, source) = (what.to_owned(), Arc::new(error));
    if transient { Error::Unavailable { what, source } } else { Error::Refused { what, source } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_not_read_as_a_pattern() {
        assert_eq!(glob_escaped(r"a*b?[c]\"), r"a\*b\?\[c\]\\");
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_named_without_its_password() {
        let connected = Redis::connect("redis://user:secret@127.0.0.1:1/", Options::default()).await;
        let error = connected.err().expect("nothing listens on port 1");
        assert!(error.is_transient());
        assert_eq!(error.to_string(), "redis at 127.0.0.1:1 is unavailable");
    }

    #[tokio::test]
    async fn an_address_that_is_none_is_refused() {
        let error = Redis::connect("not an address", Options::default()).await.err().expect("no address");
        assert!(!error.is_transient(), "{error}");
    }
}
