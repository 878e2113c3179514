//! A TCP proxy on the loopback address, for what a network does to a connection: it is late, it is silent, it breaks.
//!
//! Invariant: bytes are never lost, changed or reordered within a connection that lives on; what a silence held back arrives
//! when it ends, as TCP would deliver it after an outage.

use crate::{client::must, free_port};
use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    runtime::Runtime,
    sync::{mpsc, watch},
    time::Instant,
};

/// What a path does to its connections, those that are open and those that come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// All bytes arrive so much later, in both directions.
    Late(Duration),
    /// Connections stand and are accepted, and no byte passes: half-open.
    Silent,
    /// What the client sends arrives, and nothing comes back.
    Deaf,
}

/// How many pieces of a direction may be on their way: a peer that is late or silent pushes back.
const ON_ITS_WAY_MAX: usize = 256;

/// The bytes of a piece.
const PIECE: usize = 16 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    There,
    Back,
}

/// A path to a port of this machine.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    fault: watch::Sender<Fault>,
    /// Counted up to break what is open.
    breaks: watch::Sender<u64>,
    runtime: Option<Runtime>,
}

impl Proxy {
    /// A path to `port`, on which somebody listens now or later.
    ///
    /// # Panics
    /// When it cannot listen itself.
    #[track_caller]
    pub fn start(to: u16) -> Self {
        let port = free_port();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = must("make a runtime", runtime);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let listener = must("listen", runtime.block_on(TcpListener::bind(address)));
        let (fault, faults) = watch::channel(Fault::None);
        let (breaks, broken) = watch::channel(0);
        runtime.spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { continue };
                let (faults, mut broken) = (faults.clone(), broken.clone());
                broken.mark_unchanged();
                tokio::spawn(connection(client, to, faults, broken));
            }
        });
        Self { port, fault, breaks, runtime: Some(runtime) }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What it does to its connections from now on.
    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    /// Resets every open connection, at both ends. New ones are let through.
    pub fn reset(&self) {
        self.breaks.send_modify(|breaks| *breaks += 1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// One connection, until an end closes it or it is broken.
async fn connection(
    mut client: TcpStream,
    to: u16,
    faults: watch::Receiver<Fault>,
    mut broken: watch::Receiver<u64>,
) {
    let passing = async {
        // The path is silent before anybody at its end hears of the connection.
        let mut heard = faults.clone();
        let _ = heard.wait_for(|fault| *fault != Fault::Silent).await;
        let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await?;
        for end in [&client, &server] {
            end.set_nodelay(true)?;
            // Dropped while it is open, an end is reset. After the ends of both directions nothing is left to be lost.
            end.set_zero_linger()?;
        }
        let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
        tokio::try_join!(
            pass(from_client, to_server, Direction::There, faults.clone()),
            pass(from_server, to_client, Direction::Back, faults),
        )?;
        io::Result::Ok(())
    };
    tokio::select! {
        // How a connection ends is its ends' business.
        _ = passing => {}
        _ = broken.changed() => {}
    }
}

/// Passes one direction on, each piece after the delay that held when it came, and none while the path is silent.
async fn pass(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    direction: Direction,
    mut faults: watch::Receiver<Fault>,
) -> io::Result<()> {
    let (pieces, mut due) = mpsc::channel::<(Instant, Vec<u8>)>(ON_ITS_WAY_MAX);
    let delays = faults.clone();
    let reading = async move {
        let mut room = vec![0; PIECE];
        loop {
            let bytes = from.read(&mut room).await?;
            let delay = if let Fault::Late(delay) = *delays.borrow() { delay } else { Duration::ZERO };
            // An end is late and silent like any piece.
            let sent = pieces.send((Instant::now() + delay, room[..bytes].to_vec())).await;
            if bytes == 0 || sent.is_err() {
                return io::Result::Ok(());
            }
        }
    };
    let writing = async move {
        while let Some((at, piece)) = due.recv().await {
            tokio::time::sleep_until(at).await;
            let passes = |fault: &Fault| match fault {
                Fault::None | Fault::Late(_) => true,
                Fault::Silent => false,
                Fault::Deaf => direction == Direction::There,
            };
            // The sender lives as long as the runtime that this runs on.
            let _ = faults.wait_for(passes).await;
            match piece.is_empty() {
                true => to.shutdown().await?,
                false => to.write_all(&piece).await?,
            }
        }
        Ok(())
    };
    tokio::try_join!(reading, writing).map(|((), ())| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener as Listener, TcpStream as Stream},
    };

    /// How long what must not come is listened for, and a bound on what must.
    const SOON: Duration = Duration::from_millis(300);
    const LIMIT: Duration = Duration::from_secs(20);

    /// A path with a server at its end that says what it hears, and a connection on it.
    fn echo() -> (Proxy, Stream) {
        let listener = Listener::bind("127.0.0.1:0").expect("a port");
        let proxy = Proxy::start(listener.local_addr().expect("an address").port());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.expect("a connection");
                std::thread::spawn(move || io::copy(&mut stream.try_clone().expect("a handle"), &mut stream));
            }
        });
        let stream = connect(&proxy);
        (proxy, stream)
    }

    fn connect(proxy: &Proxy) -> Stream {
        let stream = Stream::connect(("127.0.0.1", proxy.port())).expect("a connection");
        stream.set_read_timeout(Some(LIMIT)).expect("a bound");
        stream
    }

    fn hears(stream: &mut Stream, what: &[u8]) -> bool {
        let mut heard = vec![0; what.len()];
        stream.read_exact(&mut heard).is_ok() && heard == what
    }

    #[test]
    fn what_is_sent_arrives_at_once_or_late() {
        let (proxy, mut stream) = echo();
        stream.write_all(b"one").expect("sent");
        assert!(hears(&mut stream, b"one"));
        proxy.set(Fault::Late(Duration::from_secs(1)));
        let sent = std::time::Instant::now();
        stream.write_all(b"two").expect("sent");
        assert!(hears(&mut stream, b"two"));
        assert!(sent.elapsed() >= Duration::from_secs(2), "late there and back");
    }

    #[test]
    fn a_silence_holds_back_what_arrives_after_it_on_old_and_new_connections() {
        for fault in [Fault::Silent, Fault::Deaf] {
            let (proxy, mut old) = echo();
            old.write_all(b"one").expect("sent");
            assert!(hears(&mut old, b"one"));
            proxy.set(fault);
            let mut new = connect(&proxy);
            for stream in [&mut old, &mut new] {
                stream.write_all(b"two").expect("it is accepted");
                stream.set_read_timeout(Some(SOON)).expect("a bound");
                assert!(!hears(stream, b"two"), "{fault:?}");
            }
            proxy.set(Fault::None);
            for stream in [&mut old, &mut new] {
                stream.set_read_timeout(Some(LIMIT)).expect("a bound");
                assert!(hears(stream, b"two"), "after {fault:?}");
            }
        }
    }

    #[test]
    fn a_reset_breaks_what_is_open_and_nothing_else() {
        let (proxy, mut stream) = echo();
        stream.write_all(b"one").expect("sent");
        assert!(hears(&mut stream, b"one"));
        proxy.reset();
        let end = stream.read(&mut [0; 8]).expect_err("it is reset");
        assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
        let mut new = connect(&proxy);
        new.write_all(b"two").expect("sent");
        assert!(hears(&mut new, b"two"));
    }
}
