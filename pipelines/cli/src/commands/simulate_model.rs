//! `forebay simulate-model`: a model server that needs no GPU, with faults on demand.
//!
//! Standard output has the base URL of each replica, as `--model-url` takes it, and nothing else.

use crate::{
    args::SimulateModel,
    console::{out, wrong},
    shutdown,
};
use forebay_plan::{
    Faults, Place,
    leaves::{faults_of, hint, leaves},
};
use forebay_simulator::{Options, Settings, Simulator, Wrong, keys};

/// Where vLLM listens too.
const LISTEN_DEFAULT: &str = "127.0.0.1:8000";

/// Serves until Ctrl-C or SIGTERM.
pub async fn run(args: SimulateModel) -> anyhow::Result<()> {
    let settings = settings(&args)?;
    if args.print_config {
        out(settings.document().trim_end());
        return Ok(());
    }
    let listen = args.listen.as_deref().unwrap_or(LISTEN_DEFAULT);
    let found = tokio::net::lookup_host(listen).await.ok().and_then(|mut found| found.next());
    let address = found
        .ok_or_else(|| wrong(format!("--listen is {listen:?}; write an address such as {LISTEN_DEFAULT}")))?;
    let stop = shutdown::on_signal()?;
    let options = Options {
        settings,
        listen: address,
        replicas: args.replicas,
        call_log: args.call_log,
        reader: |text| read("PUT /simulate", text).map_err(|faults| faults.to_string()),
    };
    let simulator = match Simulator::bind(options).await {
        Err(fault @ forebay_simulator::Error::Replicas(..)) => return Err(wrong(fault)),
        bound => bound?,
    };
    for address in simulator.addresses() {
        out(format_args!("http://{address}/v1"));
    }
    simulator.run(stop.cancelled()).await;
    Ok(())
}

/// Defaults, then the file, then flags.
fn settings(args: &SimulateModel) -> anyhow::Result<Settings> {
    let mut pairs = Vec::new();
    if let Some(path) = &args.config {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|fault| wrong(format!("could not read settings {name}: {fault}")))?;
        pairs = read(&name, &text).map_err(wrong)?;
    }
    let flags = [("seed", &args.seed), ("latency", &args.latency)];
    pairs.extend(flags.into_iter().filter_map(|(path, value)| Some((path.to_owned(), value.clone()?))));
    for set in &args.set {
        let Some((path, value)) = set.split_once('=') else {
            return Err(wrong(format!("--set is {set:?}; write PATH=VALUE, such as faults.cut=1%")));
        };
        known(path).map_err(|fault| wrong(format!("--set: {fault}")))?;
        pairs.push((path.to_owned(), value.to_owned()));
    }
    Settings::default().with(pairs).map_err(wrong)
}

/// The settings that a document names, or all that is wrong with it.
fn read(name: &str, text: &str) -> Result<Vec<(String, String)>, Faults> {
    let found = leaves(name, text)?;
    let mut faults: Vec<(Place, String)> = Vec::new();
    for leaf in &found {
        let checked = known(&leaf.path).and_then(|()| {
            Settings::check_one(&leaf.path, &leaf.value).map_err(|wrong| format!("{} {wrong}", leaf.path))
        });
        faults.extend(checked.err().map(|fault| (leaf.place, fault)));
    }
    let pairs: Vec<(String, String)> =
        found.iter().map(|leaf| (leaf.path.clone(), leaf.value.clone())).collect();
    // What is wrong with several together is told where the first of them stands.
    if faults.is_empty()
        && let Err(Wrong { path, message }) = Settings::default().with(pairs.clone())
    {
        let place =
            found.iter().find(|leaf| leaf.path.starts_with(&path)).map_or(Place::START, |leaf| leaf.place);
        faults.push((place, format!("{path} {message}")));
    }
    if faults.is_empty() { Ok(pairs) } else { Err(faults_of(name, faults)) }
}

fn known(path: &str) -> Result<(), String> {
    let keys: Vec<String> = keys().map(|(path, ..)| path).collect();
    if keys.iter().any(|key| key == path) {
        return Ok(());
    }
    let hint =
        hint(path, keys.iter().map(String::as_str)).map(|hint| format!("; {hint}")).unwrap_or_default();
    Err(format!("unknown key {path:?}{hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        read("pool.yaml", text).unwrap_err().to_string()
    }

    #[test]
    fn what_is_wrong_has_a_place_and_a_hint() {
        let fault = refused("seed: 1\nlatnecy: 5ms\n"); // misspelt on purpose
        assert_eq!(fault, "pool.yaml:2:1: unknown key \"latnecy\"; did you mean \"latency\"?"); // misspelt on purpose
        assert!(
            refused("faults:\n  cut: 200%\n")
                .starts_with("pool.yaml:2:3: faults.cut is \"200%\"; write a share")
        );
        assert!(
            refused("faults: {cut: 0.6, reset: 0.6}").starts_with("pool.yaml:1:10: faults make 1.2 together")
        );
        let two = refused("latency: fast\nengine: {slots: 0}\n");
        assert!(
            two.contains("pool.yaml:1:1: latency") && two.contains("pool.yaml:2:10: engine.slots"),
            "{two}"
        );
    }

    #[test]
    fn what_is_printed_can_be_read_again() {
        let document = Settings::default().document();
        assert_eq!(read("pool.yaml", &document).unwrap().len(), keys().count());
        let lists = "speeds: [1, 0.5]\nmodels: [a, b]\nlatency: log-normal 50ms..5s, 1% 30s\n";
        assert_eq!(read("pool.yaml", lists).unwrap()[0], ("speeds".to_owned(), "1,0.5".to_owned()));
    }
}
