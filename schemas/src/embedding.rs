//! What a text says, in the numbers of a model.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The vector that a model made of a text.
///
/// Its numbers mean nothing beside those of another model, so the model travels with them. On the wire they are the base64 of
/// little-endian 32-bit floats, as OpenAI's API has it: exact, and less than half as long as their digits.
///
/// Invariant: at least one number, and each is finite.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Written", into = "Written")]
pub struct Embedding {
    model: String,
    vector: Vec<f32>,
}

impl Embedding {
    /// The vector of this model; `None` where it has no number, or one that is not finite.
    pub fn new(model: impl Into<String>, vector: Vec<f32>) -> Option<Self> {
        let is_one = !vector.is_empty() && vector.iter().all(|number| number.is_finite());
        is_one.then(|| Self { model: model.into(), vector })
    }

    /// The model that made it.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Its numbers.
    pub fn vector(&self) -> &[f32] {
        &self.vector
    }

    /// Whether it may be compared with others of this model and length.
    pub fn is_of(&self, model: &str, dimensions: usize) -> bool {
        self.model == model && self.vector.len() == dimensions
    }
}

/// A vector as it is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Embedding")]
struct Written {
    /// The model that made it. Vectors of different models are not compared.
    model: String,
    /// How many numbers it has.
    dimensions: usize,
    /// The numbers: 32-bit floats, little-endian, in base64.
    vector: String,
}

impl From<Embedding> for Written {
    fn from(Embedding { model, vector }: Embedding) -> Self {
        Self { model, dimensions: vector.len(), vector: to_base64(&vector) }
    }
}

impl TryFrom<Written> for Embedding {
    type Error = &'static str;

    fn try_from(Written { model, dimensions, vector }: Written) -> Result<Self, Self::Error> {
        let vector = of_base64(&vector).ok_or("\"vector\" is no base64 of 32-bit floats")?;
        if vector.len() != dimensions {
            return Err("\"vector\" has not as many numbers as \"dimensions\" says");
        }
        Self::new(model, vector).ok_or("\"vector\" has no numbers, or one that is not finite")
    }
}

/// 32-bit floats, little-endian, in base64.
pub fn to_base64(numbers: &[f32]) -> String {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

/// The same read back; `None` where it is something else.
pub fn of_base64(text: &str) -> Option<Vec<f32>> {
    let bytes = STANDARD.decode(text).ok()?;
    let (numbers, rest) = bytes.as_chunks();
    rest.is_empty().then(|| numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}
