//! An operator as a host sees it: bytes in, addressed bytes out.

use crate::{Context, Failure, Operator, Output, Port};
use forebay_schemas::{DecodeError, Hop, Identity, Record, Request};
use futures::future::BoxFuture;
use std::sync::Arc;

/// An operator without its types.
pub trait Step: Send + Sync + 'static {
    /// The operator's name.
    fn operator(&self) -> &'static str;
    /// The part of the way that its time counts as.
    fn hop(&self) -> Option<Hop>;
    /// The name of the record that it takes.
    fn input(&self) -> &'static str;
    /// Whether that record is the work of one request, which must end in a result.
    fn is_job(&self) -> bool;
    /// Its ways out.
    fn ports(&self) -> &'static [Port];
    /// Reads a message.
    fn open(&self, key: Option<&str>, body: Option<&[u8]>) -> Result<Box<dyn Opened + '_>, DecodeError>;
}

/// A message that has been read and not yet processed.
pub trait Opened: Send {
    /// What the record says of itself.
    fn identity(&self) -> Identity;
    /// The request that it is the work of.
    fn request(&self) -> Option<&Request>;
    /// Processes it.
    fn run<'a>(self: Box<Self>, cx: &'a Context) -> BoxFuture<'a, Result<Vec<Addressed>, Failure>>
    where
        Self: 'a;
}

/// What leaves an operator: bytes, and the port by which they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addressed {
    /// The port.
    pub port: &'static str,
    /// The key; `None` means the id of the request.
    pub key: Option<String>,
    /// The bytes; `None` is a tombstone.
    pub body: Option<Vec<u8>>,
}

struct Erased<O>(O);

/// Takes an operator's types away, for a host.
pub fn step<O: Operator>(operator: O) -> Arc<dyn Step> {
    Arc::new(Erased(operator))
}

impl<O: Operator> Step for Erased<O> {
    fn operator(&self) -> &'static str {
        O::NAME
    }
    fn hop(&self) -> Option<Hop> {
        O::HOP
    }
    fn input(&self) -> &'static str {
        O::In::NAME
    }
    fn is_job(&self) -> bool {
        O::In::JOB
    }
    fn ports(&self) -> &'static [Port] {
        O::Out::PORTS
    }
    fn open(&self, key: Option<&str>, body: Option<&[u8]>) -> Result<Box<dyn Opened + '_>, DecodeError> {
        let record = match body {
            Some(body) => O::In::decode(body)?,
            None => {
                key.and_then(O::In::decode_tombstone).ok_or(DecodeError::Tombstone { record: O::In::NAME })?
            }
        };
        Ok(Box::new(Read { operator: &self.0, record }))
    }
}

struct Read<'o, O: Operator> {
    operator: &'o O,
    record: O::In,
}

impl<O: Operator> Opened for Read<'_, O> {
    fn identity(&self) -> Identity {
        self.record.identity()
    }
    fn request(&self) -> Option<&Request> {
        self.record.request()
    }
    fn run<'a>(self: Box<Self>, cx: &'a Context) -> BoxFuture<'a, Result<Vec<Addressed>, Failure>>
    where
        Self: 'a,
    {
        Box::pin(async move {
            let outputs = self.operator.process(self.record, cx).await?;
            outputs.iter().map(address).collect()
        })
    }
}

fn address<O: Output>(output: &O) -> Result<Addressed, Failure> {
    let body = output.encode().map_err(|error| Failure::rejected("unencodable", error.to_string()))?;
    Ok(Addressed { port: output.port(), key: output.key().map(str::to_owned), body })
}
