//! The protocol as drivers speak it, message by message: psql of before version 16 prepares nothing by name.

use super::*;
use crate::guards::{Limits, Scope};
use crate::session::tests::Tables;
use crate::table::Table;
use bytes::BytesMut;
use postgres_protocol::IsNull;
use postgres_protocol::message::frontend;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::oneshot;

const TOKEN: &str = "ana-token-of-at-least-32-characters";

struct World {
    address: SocketAddr,
    tables: Tables,
    /// Dropped, it stops the server.
    _stop: oneshot::Sender<()>,
}

impl World {
    async fn new() -> Self {
        let tables = Tables::new();
        let rows = ["acme", "globex"].map(|tenant| json!({"tenant": tenant, "request_id": tenant}));
        tables.add(Table::Outcomes, &rows).await;
        let hash = blake3::hash(TOKEN.as_bytes()).to_hex().to_string();
        let users = json!({"users": {"ana": {"tenants": ["acme"], "token_blake3": hash}}});
        let users = Users::read("u.json", &users.to_string()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let session = tables.session(Limits::default(), Scope::All);
        tokio::spawn(async move {
            let shutdown = async { stopped.await.unwrap_or_default() };
            serve(listener, session, users, shutdown).await
        });
        Self { address, tables, _stop: stop }
    }

    /// A client that has logged in.
    async fn client(&self) -> Client {
        let mut client = Client { socket: TcpStream::connect(self.address).await.unwrap() };
        // As psql does, which takes no for an answer.
        client.send(frontend::ssl_request).await;
        assert_eq!(client.socket.read_u8().await.unwrap(), b'N');
        let who = [("user", "ana"), ("database", "forebay")];
        client.send(|out| frontend::startup_message(who, out).unwrap()).await;
        let (kind, code) = client.hear().await;
        assert_eq!((kind, code.as_slice()), (b'R', &[0, 0, 0, 3][..]), "the password is asked for");
        client.send(|out| frontend::password_message(TOKEN.as_bytes(), out).unwrap()).await;
        assert_eq!(client.answer().await, Vec::<String>::new());
        client
    }
}

struct Client {
    socket: TcpStream,
}

impl Client {
    async fn send(&mut self, write: impl FnOnce(&mut BytesMut)) {
        let mut out = BytesMut::new();
        write(&mut out);
        self.socket.write_all(&out).await.unwrap();
    }

    /// The kind and the body of the next message.
    async fn hear(&mut self) -> (u8, Vec<u8>) {
        let kind = self.socket.read_u8().await.unwrap();
        // The length counts itself.
        let length = self.socket.read_i32().await.unwrap();
        let mut body = vec![0; usize::try_from(length - 4).unwrap()];
        self.socket.read_exact(&mut body).await.unwrap();
        (kind, body)
    }

    /// Rows up to where the server is ready again, each with its only column; an error as it is told.
    async fn answer(&mut self) -> Vec<String> {
        let mut rows = Vec::new();
        loop {
            match self.hear().await {
                // Behind how many columns there are, and the length of the only one.
                (b'D', row) => rows.push(String::from_utf8(row[6..].to_vec()).unwrap()),
                (b'E', fault) => rows.push(String::from_utf8_lossy(&fault).into_owned()),
                (b'Z', _) => return rows,
                _ => {}
            }
        }
    }

    async fn prepare(&mut self, name: &str, sql: &str) -> Vec<String> {
        let prepare = |out: &mut BytesMut| {
            frontend::parse(name, sql, [], out).unwrap();
            frontend::describe(b'S', name, out).unwrap();
            frontend::sync(out);
        };
        self.send(prepare).await;
        self.answer().await
    }

    /// Asks what was prepared under a name, with this value for its only parameter.
    async fn ask(&mut self, name: &str, value: &str) -> Vec<String> {
        let text = |value: &str, out: &mut BytesMut| {
            out.extend_from_slice(value.as_bytes());
            Ok(IsNull::No)
        };
        let ask = |out: &mut BytesMut| {
            if frontend::bind("", name, [], [value], text, [], out).is_err() {
                panic!("{value:?} cannot be sent");
            }
            frontend::execute("", 0, out).unwrap();
            frontend::sync(out);
        };
        self.send(ask).await;
        self.answer().await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_prepared_by_name_is_asked_again_and_sees_what_has_come_since() {
    let world = World::new().await;
    let mut client = world.client().await;
    let none = Vec::<String>::new();
    assert_eq!(client.prepare("rows", "SELECT count(*) FROM outcomes WHERE request_id = $1").await, none);
    assert_eq!(
        client
            .prepare("cost", "SELECT coalesce(sum(billed_nano_usd), 0) FROM outcomes WHERE tenant = $1")
            .await,
        none
    );
    assert_eq!(client.ask("rows", "acme").await, ["1"]);
    assert_eq!(client.ask("rows", "globex").await, ["0"], "it is another tenant's");
    assert_eq!(client.ask("cost", "acme").await, ["0"]);
    let more = json!({"tenant": "acme", "request_id": "acme", "billed_nano_usd": 7});
    world.tables.add(Table::Outcomes, &[more]).await;
    assert_eq!(client.ask("rows", "acme").await, ["2"]);
    assert_eq!(client.ask("cost", "acme").await, ["7"]);
    let told = client.ask("nobody", "acme").await.concat();
    assert!(told.contains("nobody"), "{told}");
    let told = client.prepare("drop", "DROP TABLE outcomes").await.concat();
    assert!(told.contains("written by the sink"), "{told}");
    // A refusal ends nothing but its own query.
    assert_eq!(client.ask("rows", "acme").await, ["2"]);
}
