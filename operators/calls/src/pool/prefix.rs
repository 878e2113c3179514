//! Which beginnings of prompts an endpoint has seen, and so holds in its KV cache most likely.
//!
//! Engines keep what they computed of a prompt by blocks of tokens, each named by a hash of itself and all before it
//! (vLLM's automatic prefix caching, SGLang's radix tree). The same is done here with blocks of bytes, without asking the
//! engine: approximate, and as Kubernetes' inference gateway found, good enough.
//!
//! Invariant: bounded in both ways. Of a prompt only the beginning is looked at, and of the blocks seen only the youngest
//! are remembered.

use crate::Call;
use forebay_schemas::Content;
use std::{
    collections::{HashSet, hash_map::DefaultHasher},
    hash::Hasher as _,
};

/// The bytes of a block: about 128 tokens.
const BLOCK_BYTES: usize = 512;
/// The blocks of a prompt that are looked at: 64 KiB.
const BLOCKS_MAX: usize = 128;
/// The blocks of a generation. Up to two generations are remembered.
const GENERATION_BLOCKS_MAX: usize = 16_384;

/// The names of a prompt's first blocks. What is left over behind the last whole block is in none.
pub(super) fn blocks(model: &str, call: &Call<'_>) -> Vec<u64> {
    let mut hasher = DefaultHasher::new();
    hasher.write(model.as_bytes());
    let (mut names, mut filled) = (Vec::new(), 0);
    let mut feed = |mut bytes: &[u8]| {
        while !bytes.is_empty() && names.len() < BLOCKS_MAX {
            let (part, rest) = bytes.split_at(bytes.len().min(BLOCK_BYTES - filled));
            hasher.write(part);
            filled += part.len();
            bytes = rest;
            if filled == BLOCK_BYTES {
                // The hasher goes on: each name stands for all before it, too.
                names.push(hasher.finish());
                filled = 0;
            }
        }
    };
    for message in &call.messages {
        feed(format!("\0{:?}\0", message.role).as_bytes());
        match &message.content {
            Some(Content::Text(text)) => feed(text.as_bytes()),
            Some(Content::Parts(parts)) => parts
                .iter()
                .filter_map(|part| part.get("text")?.as_str())
                .for_each(|text| feed(text.as_bytes())),
            None => {}
        }
    }
    names
}

/// The blocks that one endpoint has seen: the least recently used are forgotten, a whole generation at a time.
#[derive(Debug, Default)]
pub(super) struct Seen {
    young: HashSet<u64>,
    old: HashSet<u64>,
}

impl Seen {
    /// Which part of a prompt, from its beginning, it has seen.
    pub(super) fn part_of(&self, blocks: &[u64]) -> f64 {
        let known = |block: &&u64| self.young.contains(block) || self.old.contains(block);
        match blocks.len() {
            0 => 0.0,
            all => blocks.iter().take_while(known).count() as f64 / all as f64,
        }
    }

    /// It sees this prompt.
    pub(super) fn sees(&mut self, blocks: &[u64]) {
        for block in blocks {
            if self.young.len() >= GENERATION_BLOCKS_MAX {
                self.old = std::mem::take(&mut self.young);
            }
            self.young.insert(*block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::{Message, Role};

    fn call(system: &str, user: &str) -> Call<'static> {
        let message = |role, text: &str| Message {
            role,
            content: Some(Content::Text(text.to_owned())),
            rest: Default::default(),
        };
        let messages = vec![message(Role::System, system), message(Role::User, user)];
        Call { messages, ..Call::default() }
    }

    #[test]
    fn prompts_share_the_blocks_of_their_beginning() {
        let long = "x".repeat(5_000);
        let (one, two) = (blocks("m", &call(&long, "a")), blocks("m", &call(&long, "b")));
        assert_eq!((one.len(), &one), (9, &two), "the question is in no whole block");
        let other = blocks("m", &call(&format!("y{long}"), "a"));
        assert!(one.iter().zip(&other).all(|(one, other)| one != other));
        assert_ne!(one, blocks("n", &call(&long, "a")), "models share nothing");
        assert!(blocks("m", &call("short", "a")).is_empty());
        assert_eq!(blocks("m", &call(&"x".repeat(1 << 20), "a")).len(), 128);
    }

    #[test]
    fn what_was_not_used_for_long_is_forgotten() {
        let mut seen = Seen::default();
        let many = |from: u64| (from..from + 10_000).collect::<Vec<_>>();
        seen.sees(&[1, 2, 3, 4]);
        assert_eq!(seen.part_of(&[1, 2, 9, 4]), 0.5, "only from the beginning");
        for round in 1..10 {
            seen.sees(&many(round * 100_000));
            seen.sees(&[1]);
        }
        assert_eq!(seen.part_of(&[1, 2, 3, 4]), 0.25);
        assert!(seen.young.len() + seen.old.len() <= 2 * GENERATION_BLOCKS_MAX);
    }
}
