//! The route, over real connections.

use super::*;
use crate::guards::Limits;
use crate::session::tests::Tables;
use crate::table::Table;
use arrow::ipc::reader::StreamReader;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::oneshot;

const ANA: &str = "ana-token-of-at-least-32-characters";
const OPS: &str = "ops-token-of-at-least-32-characters";

struct Asked {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Asked {
    fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }
}

struct World {
    address: SocketAddr,
    /// Dropped, it stops the server.
    _stop: oneshot::Sender<()>,
    _tables: Tables,
}

impl World {
    async fn new(limits: Limits) -> Self {
        let tables = Tables::new();
        let rows: Vec<_> =
            ["acme", "globex"].iter().map(|tenant| json!({"tenant": tenant, "request_id": tenant})).collect();
        tables.add(Table::Outcomes, &rows).await;
        let hash = |token: &str| blake3::hash(token.as_bytes()).to_hex().to_string();
        let users = json!({"users": {
            "ana": {"tenants": ["acme"], "token_blake3": hash(ANA)}, "ops": {"tenants": ["*"], "token_blake3": hash(OPS)},
            "old": {"tenants": ["*"]},
        }});
        let users = Users::read("u.json", &users.to_string()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async { stopped.await.unwrap_or_default() };
        tokio::spawn(serve(listener, tables.session(limits, Scope::All), users, shutdown));
        Self { address, _stop: stop, _tables: tables }
    }

    async fn ask(&self, sql: &str, headers: &[(&str, &str)]) -> Asked {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        // The old version has no chunks, and ends with the connection.
        let request = format!("POST /v1/sql HTTP/1.0\r\nContent-Length: {}\r\n{headers}\r\n{sql}", sql.len());
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // Whoever is refused before all is read may be cut off behind the answer.
        let _ = stream.read_to_end(&mut answer).await;
        let at = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(answer[..at].to_vec()).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Asked { status, head: head.to_ascii_lowercase(), body: answer[at + 4..].to_vec() }
    }

    async fn as_user(&self, token: &str, accept: &str, sql: &str) -> Asked {
        self.ask(sql, &[("Authorization", &format!("Bearer {token}")), ("Accept", accept)]).await
    }
}

#[tokio::test]
async fn the_end_of_an_answer_does_not_wait_until_its_beginning_is_acknowledged() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut listener = Bounded(listener);
    let (client, (taken, _)) = tokio::join!(TcpStream::connect(address), listener.accept());
    assert!(client.is_ok() && taken.stream().nodelay().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_sent_as_the_client_accepts_them() {
    let world = World::new(Limits::default()).await;
    const SQL: &str = "SELECT tenant, CAST(NULL AS BIGINT) AS c FROM outcomes ORDER BY tenant";
    let json = world.as_user(OPS, "application/json", SQL).await;
    assert_eq!(
        (json.status, json.text().as_str()),
        (200, "[{\"tenant\":\"acme\",\"c\":null},{\"tenant\":\"globex\",\"c\":null}]")
    );
    assert!(json.head.contains("content-type: application/json"), "{}", json.head);
    let csv = world.as_user(OPS, "text/html;q=0.9, text/csv", SQL).await;
    assert_eq!(csv.text(), "tenant,c\nacme,\nglobex,\n");
    let arrow = world.as_user(OPS, ARROW, SQL).await;
    let batches: Vec<RecordBatch> =
        StreamReader::try_new(arrow.body.as_slice(), None).unwrap().map(Result::unwrap).collect();
    assert_eq!(batches.iter().map(RecordBatch::num_rows).sum::<usize>(), 2);
    let none = "SELECT tenant FROM outcomes WHERE false";
    assert_eq!(world.as_user(OPS, "*/*", none).await.text(), "[]");
    assert_eq!(world.as_user(OPS, "text/csv", none).await.text(), "tenant\n");
    let many = world.as_user(OPS, "text/csv", "SELECT * FROM generate_series(1, 100000)").await;
    assert_eq!(many.text().lines().count(), 100_001);
    assert_eq!(world.as_user(OPS, "image/png", SQL).await.status, 406);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_asks_without_a_token_and_nobody_sees_beyond_their_tenants() {
    let world = World::new(Limits::default()).await;
    const SQL: &str = "SELECT count(*) AS n FROM outcomes";
    let bearer = |token: &str| format!("Bearer {token}");
    let hash = blake3::hash(OPS.as_bytes()).to_hex().to_string();
    for given in [
        None,
        Some(bearer("")),
        Some(bearer("wrong")),
        Some(bearer(&hash)),
        Some(format!("Basic {OPS}")),
        Some(OPS.to_owned()),
    ] {
        let headers: Vec<_> = given.iter().map(|given| ("Authorization", given.as_str())).collect();
        let told = world.ask(SQL, &headers).await;
        assert_eq!(told.status, 401, "{given:?}");
        assert!(told.head.contains("www-authenticate: bearer"), "{}", told.head);
    }
    assert_eq!(world.as_user(OPS, JSON, SQL).await.text(), "[{\"n\":2}]");
    assert_eq!(world.as_user(ANA, JSON, SQL).await.text(), "[{\"n\":1}]");
    let told = world.as_user(ANA, JSON, "SELECT * FROM kafka('outcomes')").await;
    assert_eq!(told.status, 403, "{}", told.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_has_a_status_and_says_the_way_out() {
    let limits = Limits { scan_bytes: 1, ..Limits::default() };
    let hasty = World::new(Limits { deadline: Duration::from_millis(500), ..limits }).await;
    let world = World::new(limits).await;
    for (sql, status, wanted) in [
        ("SELECT tennant FROM outcomes", 400, "\"column\":8"),
        ("", 400, "there must be one query, and there are 0"),
        ("SELECT 1; SELECT 2", 400, "there must be one query, and there are 2"),
        ("DELETE FROM outcomes", 403, "tables are only read here"),
        ("SELECT count(*) FROM outcomes", 403, "no bound on its time"),
        (
            "SELECT count(*) FROM generate_series(1, 10000000) AS a, generate_series(1, 10000000) AS b",
            504,
            "--deadline",
        ),
    ] {
        let asked = if status == 504 { &hasty } else { &world };
        let told = asked.as_user(OPS, JSON, sql).await;
        assert_eq!(told.status, status, "{sql}: {}", told.text());
        assert!(told.head.contains(PROBLEM) && told.text().contains(wanted), "{sql}: {}", told.text());
    }
    let long = format!("SELECT 1 -- {}", "x".repeat(BODY_MAX));
    assert_eq!(world.as_user(OPS, JSON, &long).await.status, 413);
}
