//! The vector port: passages to retrieve, questions already answered, facts remembered.
//!
//! A point belongs to a *scope*, which decides who may find it (a tenant, an access list), and to a *group*, with
//! which it comes and goes (a document).
//!
//! Invariant of every adapter: no search returns a point of a scope that it did not name, and no search sees a group
//! half replaced.

mod embedded;
mod index;

use bytes::Bytes;

pub use self::embedded::Embedded;
use crate::error::check_size;
use crate::{Answer, Error};

/// The longest vector.
pub const DIMENSIONS_MAX: usize = 8192;
/// The longest id, scope or group.
pub const NAME_BYTES_MAX: usize = 1024;
/// The largest payload of a point.
pub const PAYLOAD_BYTES_MAX: usize = 1024 * 1024;
/// The most points of a group.
pub const POINTS_MAX: usize = 10_000;
/// The most hits of a search.
pub const HITS_MAX: usize = 1000;
/// The most scopes of a search.
pub const SCOPES_MAX: usize = 1000;

/// Something that can be found by its direction.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Tells it from the others of its group.
    pub id: String,
    /// Who may find it.
    pub scope: String,
    /// Of any length; only its direction counts. A vector of zeros is similar to nothing: its score is always 0.
    pub vector: Vec<f32>,
    /// Comes back with a hit.
    pub payload: Bytes,
}

/// A point that was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Hit {
    /// The point's id.
    pub id: String,
    /// The point's group.
    pub group: String,
    /// The cosine of the angle to the query, -1 to 1 but for rounding.
    pub score: f32,
    /// The point's payload.
    pub payload: Bytes,
}

/// A store of points. All vectors of one store have the same length, fixed by the first until [`Vectors::clear`].
pub trait Vectors: Send + Sync + 'static {
    /// Makes `points` the points of `group`, in place of those that it had; none removes it. In one step.
    fn replace(&self, group: &str, points: Vec<Point>) -> Answer<'_, ()>;

    /// The `limit` points of these scopes that are most similar to `query`, best first, ties by id, then by group.
    fn search(&self, query: &[f32], scopes: &[&str], limit: usize) -> Answer<'_, Vec<Hit>>;

    /// How many points there are in all scopes.
    fn count(&self) -> Answer<'_, u64>;

    /// Removes all, and with it the length that vectors must have.
    fn clear(&self) -> Answer<'_, ()>;
}

fn check_name(what: &'static str, name: &str) -> Result<(), Error> {
    check_size(what, name.len(), NAME_BYTES_MAX)
}

fn check_vector(vector: &[f32]) -> Result<(), Error> {
    check_size("vector in dimensions", vector.len(), DIMENSIONS_MAX)?;
    if vector.iter().all(|component| component.is_finite()) { Ok(()) } else { Err(Error::NotFinite) }
}

/// Returns the bytes of all together.
fn check_points(group: &str, points: &[Point]) -> Result<usize, Error> {
    check_name("group in bytes", group)?;
    check_size("number of points", points.len(), POINTS_MAX)?;
    let (mut bytes, mut ids) = (0, std::collections::HashSet::new());
    for point in points {
        check_name("id in bytes", &point.id)?;
        check_name("scope in bytes", &point.scope)?;
        check_size("payload in bytes", point.payload.len(), PAYLOAD_BYTES_MAX)?;
        check_vector(&point.vector)?;
        if !ids.insert(&point.id) {
            return Err(Error::Duplicate { group: group.to_owned(), id: point.id.clone() });
        }
        bytes +=
            group.len() + point.id.len() + point.scope.len() + point.payload.len() + 4 * point.vector.len();
    }
    check_size("points in bytes", bytes, crate::database::WRITE_BYTES_MAX)?;
    Ok(bytes)
}
