//! Points in memory: for each scope one matrix, row after row, that a search reads from end to end.
//!
//! Exact, because at the sizes of one machine it can be: the figures stand in the README. Invariant: row `i` of
//! `matrix` is the vector of `rows[i]`, of length 1 or all zeros, so that a dot product is a cosine.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use bytes::Bytes;

use super::{Hit, Point};

/// Sums kept apart in a dot product, so that the compiler may use the widest registers there are.
const LANES: usize = 16;

#[derive(Default)]
pub(super) struct Index {
    /// None while no vector has fixed it.
    pub(super) dimensions: Option<usize>,
    scopes: HashMap<Arc<str>, Scope>,
    /// The scopes in which a group has points: where to look when it goes.
    groups: HashMap<Arc<str>, Vec<Arc<str>>>,
    pub(super) points: u64,
}

#[derive(Default)]
struct Scope {
    matrix: Vec<f32>,
    rows: Vec<Row>,
}

struct Row {
    id: String,
    group: Arc<str>,
    payload: Bytes,
}

impl Index {
    /// `points` are normalised and of one length.
    pub(super) fn replace(&mut self, group: &str, points: Vec<Point>) {
        self.remove(group);
        for point in points {
            self.insert(group, point);
        }
    }

    pub(super) fn insert(&mut self, group: &str, point: Point) {
        self.dimensions = Some(point.vector.len());
        let group =
            self.groups.get_key_value(group).map_or_else(|| group.into(), |(known, _)| Arc::clone(known));
        let scope = self.scopes.get_key_value(point.scope.as_str());
        let scope = scope.map_or_else(|| point.scope.as_str().into(), |(known, _)| Arc::clone(known));
        let scopes = self.groups.entry(Arc::clone(&group)).or_default();
        if !scopes.contains(&scope) {
            scopes.push(Arc::clone(&scope));
        }
        let scope = self.scopes.entry(scope).or_default();
        scope.matrix.extend_from_slice(&point.vector);
        scope.rows.push(Row { id: point.id, group, payload: point.payload });
        self.points += 1;
    }

    fn remove(&mut self, group: &str) {
        let (Some(dimensions), Some((group, scopes))) = (self.dimensions, self.groups.remove_entry(group))
        else {
            return;
        };
        for name in scopes {
            let Some(scope) = self.scopes.get_mut(&name) else { continue };
            self.points -= scope.remove(&group, dimensions);
            if scope.rows.is_empty() {
                self.scopes.remove(&name);
            }
        }
    }

    /// `query` is normalised and of the stored length; `scopes` names each scope once.
    pub(super) fn search(&self, query: &[f32], scopes: &[String], limit: usize) -> Vec<Hit> {
        let mut best = BinaryHeap::with_capacity(limit + 1);
        // chunks_exact refuses a length of 0, and vectors without a component have no direction anyway.
        let dimensions = query.len().max(1);
        for scope in scopes.iter().filter_map(|name| self.scopes.get(name.as_str())) {
            for (row, vector) in scope.rows.iter().zip(scope.matrix.chunks_exact(dimensions)) {
                let candidate = Candidate { score: dot(query, vector), row };
                // A heap of the best few, the worst of them on top.
                if best.len() < limit {
                    best.push(Reverse(candidate));
                } else if best.peek().is_some_and(|worst| candidate > worst.0) {
                    best.pop();
                    best.push(Reverse(candidate));
                }
            }
        }
        best.into_sorted_vec().into_iter().map(|Reverse(candidate)| candidate.hit()).collect()
    }
}

impl Scope {
    /// Fills each gap with the last row, since no order is promised among rows. Returns how many went.
    fn remove(&mut self, group: &Arc<str>, dimensions: usize) -> u64 {
        let (mut at, mut removed) = (0, 0);
        while at < self.rows.len() {
            if !Arc::ptr_eq(&self.rows[at].group, group) {
                at += 1;
                continue;
            }
            let last = (self.rows.len() - 1) * dimensions;
            self.matrix.copy_within(last.., at * dimensions);
            self.matrix.truncate(last);
            self.rows.swap_remove(at);
            removed += 1;
        }
        removed
    }
}

/// Greater is better: a higher score, then a smaller id, then a smaller group.
struct Candidate<'i> {
    score: f32,
    row: &'i Row,
}

impl Candidate<'_> {
    fn hit(&self) -> Hit {
        Hit {
            id: self.row.id.clone(),
            group: self.row.group.to_string(),
            score: self.score,
            payload: self.row.payload.clone(),
        }
    }
}

impl Ord for Candidate<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_score = self.score.total_cmp(&other.score);
        by_score
            .then_with(|| other.row.id.cmp(&self.row.id))
            .then_with(|| other.row.group.cmp(&self.row.group))
    }
}

impl PartialOrd for Candidate<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate<'_> {}

/// The vector of the same direction and length 1; zeros stay zeros.
pub(super) fn normalised(vector: &[f32]) -> Vec<f32> {
    // In f64, because the square of an f32 need not fit one.
    let length = vector.iter().map(|&component| f64::from(component).powi(2)).sum::<f64>().sqrt();
    if length == 0.0 {
        return vec![0.0; vector.len()];
    }
    #[expect(clippy::cast_possible_truncation, reason = "a component of a vector of length 1 fits an f32")]
    vector.iter().map(|&component| (f64::from(component) / length) as f32).collect()
}

fn dot(left: &[f32], right: &[f32]) -> f32 {
    let (left, left_rest) = left.as_chunks::<LANES>();
    let (right, right_rest) = right.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (left, right) in left.iter().zip(right) {
        for lane in 0..LANES {
            sums[lane] += left[lane] * right[lane];
        }
    }
    // + 0.0 makes -0.0, which an order of all floats puts below 0.0, the same score.
    let rest: f32 = left_rest.iter().zip(right_rest).map(|(left, right)| left * right).sum();
    sums.iter().sum::<f32>() + rest + 0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(id: &str, scope: &str, vector: &[f32]) -> Point {
        Point { id: id.into(), scope: scope.into(), vector: normalised(vector), payload: Bytes::new() }
    }

    fn ids(index: &Index, query: &[f32], scopes: &[&str], limit: usize) -> String {
        let scopes: Vec<_> = scopes.iter().map(ToString::to_string).collect();
        let hits = index.search(&normalised(query), &scopes, limit);
        hits.iter().map(|hit| hit.id.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_nearest_come_first_and_ties_go_by_id() {
        let mut index = Index::default();
        let points =
            vec![point("c", "s", &[2.0, 0.0]), point("a", "s", &[0.0, 1.0]), point("b", "s", &[9.0, 0.0])];
        index.replace("g", points);
        assert_eq!(ids(&index, &[1.0, 0.0], &["s"], 3), "b c a");
        assert_eq!(ids(&index, &[1.0, 0.0], &["s"], 1), "b");
        assert_eq!(ids(&index, &[1.0, 0.0], &["s"], 0), "");
    }

    #[test]
    fn a_group_leaves_every_scope_it_was_in() {
        let mut index = Index::default();
        index.replace("kept", vec![point("k", "s", &[1.0, 0.1]), point("l", "t", &[1.0, 0.2])]);
        index.replace("gone", vec![point("a", "s", &[1.0, 0.0]), point("b", "t", &[1.0, 0.0])]);
        index.replace("gone", vec![]);
        assert_eq!(ids(&index, &[1.0, 0.0], &["s", "t"], 9), "k l");
        assert_eq!((index.points, index.groups.len(), index.scopes.len()), (2, 1, 2));
        index.replace("kept", vec![]);
        assert_eq!((index.points, index.groups.len(), index.scopes.len()), (0, 0, 0));
    }

    #[test]
    fn a_dot_product_counts_every_component_once() {
        for length in 0..100u8 {
            let ones = vec![1.0; usize::from(length)];
            assert_eq!(dot(&ones, &ones), f32::from(length));
        }
    }

    #[test]
    fn very_long_and_very_short_vectors_keep_their_direction() {
        for scale in [f32::MAX, f32::MIN_POSITIVE, 1.0] {
            let vector = normalised(&[scale, -scale]);
            assert!(
                (vector[0] - 0.5f32.sqrt()).abs() < 1e-6 && vector[1] == -vector[0],
                "{scale}: {vector:?}"
            );
        }
        assert_eq!(normalised(&[0.0, 0.0]), [0.0, 0.0]);
    }
}
