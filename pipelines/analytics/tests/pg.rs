//! `forebay sql --pg` as psql meets it, unchanged. Without psql it is skipped, and in CI that is a failure.

#![expect(clippy::unwrap_used, reason = "what goes wrong fails the test")]
#![expect(clippy::print_stdout, reason = "what is skipped is said")]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

const TOKEN: &str = "a token of thirty-two characters or more";

/// A server over tables that nobody has made yet.
struct Server {
    process: Child,
    port: String,
    _folder: tempfile::TempDir,
}

impl Server {
    /// Nothing where there is no psql.
    fn start() -> Option<Self> {
        if Command::new("psql").arg("--version").output().is_err() {
            assert!(std::env::var_os("CI").is_none(), "there is no psql; apt-get install postgresql-client");
            println!("skipped: there is no psql; apt-get install postgresql-client");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let users = folder.path().join("users.json");
        let hash = blake3::hash(TOKEN.as_bytes()).to_hex();
        let ana = format!(r#"{{"users":{{"ana":{{"tenants":["acme"],"token_blake3":"{hash}"}}}}}}"#);
        std::fs::write(&users, ana).unwrap();
        let tables = url::Url::from_directory_path(folder.path().join("tables")).unwrap();
        let settings = serde_json::json!({"tables": tables});
        let mut process = Command::new(env!("CARGO_BIN_EXE_forebay-sql"))
            .args(["sql", "--pg", "127.0.0.1:0", "--users"])
            .arg(Path::new(&users))
            .env("FOREBAY_SQL_SETTINGS", settings.to_string())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        BufReader::new(process.stderr.take().unwrap()).read_line(&mut said).unwrap();
        let port = said.rsplit_once("127.0.0.1:").and_then(|(_, rest)| rest.split_once('/'));
        assert!(port.is_some(), "{said}");
        Some(Self { process, port: port.unwrap().0.to_owned(), _folder: folder })
    }

    /// What psql prints, on either stream.
    fn psql(&self, token: &str, commands: &[&str]) -> String {
        let mut psql = Command::new("psql");
        psql.args(["-X", "-At", "-h", "127.0.0.1", "-p", &self.port, "-U", "ana", "forebay"]);
        for command in commands {
            psql.args(["-c", command]);
        }
        let output = psql.env("PGPASSWORD", token).output().unwrap();
        [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn psql_asks_and_describes() {
    let Some(server) = Server::start() else { return };
    assert_eq!(server.psql(TOKEN, &["SELECT count(*), 1.5 FROM outcomes"]), "0|1.5\n");
    let names = server.psql(TOKEN, &["\\d"]);
    assert!(names.contains("public|outcomes|table") && names.contains("public|cost_daily|view"), "{names}");
    let columns = server.psql(TOKEN, &["\\d labels"]);
    assert!(columns.contains("request_id|") && !columns.contains("collname"), "{columns}");
    assert_eq!(server.psql(TOKEN, &["BEGIN", "SELECT 1", "COMMIT"]), "BEGIN\n1\nCOMMIT\n");
}

#[test]
fn nobody_comes_in_without_a_token_and_nobody_writes() {
    let Some(server) = Server::start() else { return };
    let refused = server.psql("another token", &["SELECT 1"]);
    assert!(refused.contains("authentication failed for user \"ana\""), "{refused}");
    for (query, told) in [
        ("DROP TABLE outcomes", "written by the sink"),
        ("INSERT INTO labels SELECT * FROM labels", "written by the sink"),
        ("SELECT nope FROM outcomes", "nope"),
        ("SELEC 1", "SELEC"),
        ("SET datafusion.runtime.memory_limit = '500G'", "flags of"),
    ] {
        let answer = server.psql(TOKEN, &[query]);
        assert!(answer.contains("ERROR") && answer.contains(told), "{query}: {answer}");
    }
}
