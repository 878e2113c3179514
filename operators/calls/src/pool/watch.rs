//! How an engine fares, as its metrics say, and whether it is there at all.

use forebay_operator::BoxError;
use futures::future::BoxFuture;
use reqwest::{Client, Url};
use std::time::Duration;

/// How long a look may take; looks are a second apart.
const LOOK_MAX: Duration = Duration::from_millis(900);
/// The largest page of metrics, in bytes.
const PAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// How an engine fares.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Requests that wait for a place in the batch.
    pub waiting: f64,
    /// Requests in the batch.
    pub running: f64,
    /// The part of its KV cache that is in use, from 0 to 1.
    pub kv_used: f64,
}

/// Looks at an engine from outside.
pub trait Watch: Send + Sync + 'static {
    /// How it fares.
    fn load(&self) -> BoxFuture<'_, Result<Load, BoxError>>;
    /// Whether it says that it is well.
    fn is_healthy(&self) -> BoxFuture<'_, bool>;
}

/// Looks at `/metrics` and `/health`.
pub struct Http {
    client: Client,
    metrics: Url,
    health: Url,
}

impl Http {
    /// Beside the API at `base_url`, which ends in `/v1`.
    pub fn new(base_url: &str) -> Result<Self, BoxError> {
        let base: Url = base_url.trim().parse()?;
        let beside = |name: &str| {
            let mut url = base.clone();
            let path = base.path().trim_end_matches('/').trim_end_matches("/v1");
            url.set_path(&format!("{path}/{name}"));
            url
        };
        let client = Client::builder().timeout(LOOK_MAX).build()?;
        Ok(Self { client, metrics: beside("metrics"), health: beside("health") })
    }
}

impl Watch for Http {
    fn load(&self) -> BoxFuture<'_, Result<Load, BoxError>> {
        Box::pin(async {
            let mut response = self.client.get(self.metrics.clone()).send().await?.error_for_status()?;
            let mut page = Vec::new();
            while let Some(part) = response.chunk().await? {
                page.extend_from_slice(&part);
                if page.len() > PAGE_BYTES_MAX {
                    return Err(format!("the page of metrics is longer than {PAGE_BYTES_MAX} bytes").into());
                }
            }
            read(&String::from_utf8_lossy(&page)).ok_or_else(|| "no engine's metrics are on the page".into())
        })
    }

    fn is_healthy(&self) -> BoxFuture<'_, bool> {
        Box::pin(async {
            let response = self.client.get(self.health.clone()).send().await;
            response.is_ok_and(|response| response.status().is_success())
        })
    }
}

/// The names under which vLLM (an older one last), SGLang and llama.cpp tell of the same.
const WAITING: [&str; 3] =
    ["vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred"];
const RUNNING: [&str; 3] =
    ["vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing"];
const KV_USED: [&str; 4] = [
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "sglang:token_usage",
    "llamacpp:kv_cache_usage_ratio",
];

/// Reads a page in Prometheus' text form. Of several processes of an engine on one page, requests add up and the fullest cache
/// counts.
fn read(page: &str) -> Option<Load> {
    let mut seen: [Option<f64>; 3] = [None; 3];
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let name_end = line.find(['{', ' ']).unwrap_or(line.len());
        let (name, rest) = line.split_at(name_end);
        let rest = rest.rfind('}').map_or(rest, |labels_end| &rest[labels_end + 1..]);
        let Some(value) = rest.split_whitespace().next().and_then(|value| value.parse::<f64>().ok()) else {
            continue;
        };
        for (index, names) in [&WAITING[..], &RUNNING[..], &KV_USED[..]].into_iter().enumerate() {
            if value.is_finite() && names.contains(&name) {
                let before = seen[index].unwrap_or(0.0);
                seen[index] = Some(if index == 2 { before.max(value) } else { before + value });
            }
        }
    }
    let [waiting, running, kv_used] = seen;
    let said = waiting.or(running).or(kv_used).is_some();
    let [waiting, running, kv_used] = seen.map(Option::unwrap_or_default);
    said.then_some(Load { waiting, running, kv_used })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_engine_is_understood() {
        let check = |page: &str, expected: Option<(f64, f64, f64)>| {
            let load = read(page).map(|Load { waiting, running, kv_used }| (waiting, running, kv_used));
            assert_eq!(load, expected, "{page}");
        };
        let vllm = "# HELP vllm:num_requests_waiting Number of requests waiting.\n\
                    # TYPE vllm:num_requests_waiting gauge\n\
                    vllm:num_requests_waiting{engine=\"0\",model_name=\"a {b} c\"} 3.0\n\
                    vllm:num_requests_waiting{engine=\"1\",model_name=\"a\"} 1.0\n\
                    vllm:num_requests_running{engine=\"0\",model_name=\"a\"} 8.0 1700000000\n\
                    vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"a\"} 0.25\n";
        check(vllm, Some((4.0, 8.0, 0.25)));
        check("vllm:gpu_cache_usage_perc 0.5\n", Some((0.0, 0.0, 0.5)));
        let sglang = "sglang:num_queue_reqs 2\nsglang:num_running_reqs 5\nsglang:token_usage 0.75\n";
        check(sglang, Some((2.0, 5.0, 0.75)));
        let llamacpp = "llamacpp:requests_deferred 1\nllamacpp:requests_processing 4\n";
        check(llamacpp, Some((1.0, 4.0, 0.0)));
        check("process_cpu_seconds_total 3\nvllm:num_requests_waiting NaN\n", None);
        check("", None);
    }

    #[test]
    fn it_looks_beside_the_api() {
        let http = Http::new("http://h:1/a/v1/").unwrap();
        assert_eq!((http.metrics.path(), http.health.path()), ("/a/metrics", "/a/health"));
    }
}
