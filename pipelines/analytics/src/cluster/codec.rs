//! How plans travel: as Ballista writes them, with our own node and our functions.
//!
//! Invariant: a scope that a plan left with is the scope that it arrives with. `cost` is worked out by the tables of prices of who asks, or
//! not at all.

use crate::functions::{self, Prices};
use crate::guards::Barrier;
use crate::session;
use ballista_core::serde::BallistaPhysicalExtensionCodec;
use datafusion::common::{Result, internal_err};
use datafusion::execution::TaskContext;
use datafusion::logical_expr::ScalarUDF;
use datafusion::physical_plan::ExecutionPlan;
use datafusion_proto::physical_plan::{PhysicalExtensionCodec, PhysicalProtoConverterExtension};
use std::sync::Arc;

/// A node that Ballista does not know. What it writes itself is protobuf and begins with no such byte.
const SCOPE: &[u8] = b"\0forebay/scope";

#[derive(Debug)]
pub(super) struct Codec {
    theirs: BallistaPhysicalExtensionCodec,
    role: Role,
}

#[derive(Debug)]
enum Role {
    /// Sends plans away, whole or apart, and works nothing out.
    Sending,
    /// Works plans out, by these prices.
    Executing(Option<Arc<Prices>>),
}

impl Codec {
    fn of(role: Role) -> Self {
        Self { theirs: BallistaPhysicalExtensionCodec::default(), role }
    }

    pub(super) fn sending() -> Self {
        Self::of(Role::Sending)
    }

    pub(super) fn executing(prices: Option<Arc<Prices>>) -> Self {
        Self::of(Role::Executing(prices))
    }
}

impl PhysicalExtensionCodec for Codec {
    fn try_decode(
        &self,
        bytes: &[u8],
        inputs: &[Arc<dyn ExecutionPlan>],
        context: &TaskContext,
        converter: &dyn PhysicalProtoConverterExtension,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        if bytes != SCOPE {
            return self.theirs.try_decode(bytes, inputs, context, converter);
        }
        match inputs {
            [input] => Ok(Arc::new(Barrier::new(Arc::clone(input)))),
            _ => internal_err!("a scope came with {} inputs", inputs.len()),
        }
    }

    fn try_encode(
        &self,
        node: Arc<dyn ExecutionPlan>,
        bytes: &mut Vec<u8>,
        converter: &dyn PhysicalProtoConverterExtension,
    ) -> Result<()> {
        if node.is::<Barrier>() {
            bytes.extend_from_slice(SCOPE);
            return Ok(());
        }
        self.theirs.try_encode(node, bytes, converter)
    }

    fn try_encode_udf(&self, function: &ScalarUDF, bytes: &mut Vec<u8>) -> Result<()> {
        if function.name() == functions::COST {
            match functions::prices_of(function) {
                Some(prices) => bytes.extend_from_slice(prices.as_bytes()),
                None => return functions::without_prices(),
            }
        }
        Ok(())
    }

    fn try_decode_udf(&self, name: &str, bytes: &[u8]) -> Result<Arc<ScalarUDF>> {
        let asked = match blake3::Hash::from_slice(bytes) {
            Ok(prices) if name == functions::COST => prices,
            _ => return internal_err!("there is no function {name} with {} bytes", bytes.len()),
        };
        match &self.role {
            Role::Sending => functions::cost_elsewhere(asked),
            Role::Executing(Some(prices)) if prices.hash() == asked => {
                functions::cost(Some(Arc::clone(prices)), session::now_us)
            }
            // A task that cannot be taken apart is refused without a word, so it is let fail when it runs.
            Role::Executing(_) => functions::cost_elsewhere(asked),
        }
    }
}
