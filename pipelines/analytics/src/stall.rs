//! A connection whose client must take what is sent to it.
//!
//! Whoever asks and then reads nothing would keep a place, a query and its memory for ever: a server is told of nothing while the
//! client's window is closed. Here writing fails after a bounded time without a byte taken, and the connection ends.
//!
//! Invariant: a client that takes a byte in time is never cut off, however slowly it reads; for that a query has its deadline.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// How long a client may take nothing: longer than a network is away that comes back.
pub const STALL_MAX: Duration = Duration::from_secs(30);

/// A connection that ends where its client takes nothing for so long.
pub struct Stalling<S> {
    stream: S,
    stall_max: Duration,
    /// Runs while something waits to be written.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Stalling<S> {
    /// Bounds a connection.
    pub fn new(stream: S, stall_max: Duration) -> Self {
        Self { stream, stall_max, stalled: None }
    }

    /// The connection itself.
    #[cfg(test)]
    pub(crate) fn stream(&self) -> &S {
        &self.stream
    }

    /// The same result, or an error where writing has waited for too long.
    fn within<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stall_max = self.stall_max;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(stall_max)));
        ready!(stalled.as_mut().poll(context));
        let told = format!("the client took nothing for {} s", stall_max.as_secs_f64());
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, told)))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Stalling<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Stalling<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.within(context, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        // A socket has nothing of its own to flush, so it is always done: that says nothing of what waits to be written.
        if flushed.is_ready() { flushed } else { self.within(context, flushed) }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = Pin::new(&mut self.stream).poll_shutdown(context);
        self.within(context, ended)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, buffers);
        self.within(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_for_too_long_is_cut_off_and_who_takes_little_is_not() {
        let (ours, mut theirs) = duplex(8);
        let mut ours = Stalling::new(ours, STALL_MAX);
        let slow = async {
            for _ in 0..20 {
                sleep(STALL_MAX - Duration::from_millis(1)).await;
                theirs.read_u8().await.unwrap();
            }
        };
        let (sent, ()) = tokio::join!(ours.write_all(&[7; 28]), slow);
        sent.unwrap();
        let fault = ours.write_all(&[7; 28]).await.unwrap_err();
        assert_eq!(fault.kind(), io::ErrorKind::TimedOut);
        assert_eq!(fault.to_string(), "the client took nothing for 30 s");
    }
}
