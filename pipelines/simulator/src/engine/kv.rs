//! The KV cache: blocks that running sequences hold, and full blocks of prompts that are kept for whoever begins alike.
//!
//! A block of a prompt is known by a hash of all that stands before it and of itself, so equal beginnings share blocks. One
//! that nobody holds any more stays until its place is needed, the longest unused first.
//!
//! Invariant: blocks held and kept are never more than there are.

use std::collections::{BTreeMap, HashMap};

/// The blocks of an engine.
#[derive(Debug)]
pub struct Kv {
    capacity: u32,
    /// Blocks of prompts by hash, held or only kept.
    known: HashMap<u64, Known>,
    /// Those that nobody holds, in the order in which they were let go.
    idle: BTreeMap<u64, u64>,
    /// Held blocks that nobody can share.
    private: u32,
    let_go: u64,
}

#[derive(Debug)]
struct Known {
    holders: u32,
    /// Its place in `idle`; of meaning while there are no holders.
    let_go: u64,
}

/// What a sequence holds.
#[derive(Debug, Default)]
pub struct Held {
    shared: Vec<u64>,
    private: u32,
}

impl Held {
    /// How many blocks.
    pub fn blocks(&self) -> u32 {
        count(self.shared.len()).saturating_add(self.private)
    }
}

impl Kv {
    /// So many blocks, all free.
    pub fn new(capacity: u32) -> Self {
        Self { capacity, known: HashMap::new(), idle: BTreeMap::new(), private: 0, let_go: 0 }
    }

    /// The part that sequences hold.
    pub fn usage(&self) -> f64 {
        f64::from(self.held()) / f64::from(self.capacity.max(1))
    }

    fn held(&self) -> u32 {
        count(self.known.len() - self.idle.len()) + self.private
    }

    /// Takes `blocks` for a prompt whose full blocks have these hashes, and says how many of them were known; of these at
    /// most `hits_max` count. None where there is no room.
    pub fn take(&mut self, hashes: &[u64], hits_max: usize, blocks: u32) -> Option<(Held, u32)> {
        let hits = hashes.iter().take(hits_max).take_while(|hash| self.known.contains_key(hash)).count();
        let woken = hashes[..hits].iter().filter(|hash| self.known[*hash].holders == 0).count();
        let wanted = self.held() + count(woken) + blocks.saturating_sub(count(hits));
        if wanted > self.capacity {
            return None;
        }
        let mut held = Held::default();
        for (place, hash) in hashes.iter().enumerate() {
            match self.known.get_mut(hash) {
                Some(known) if place < hits => {
                    if known.holders == 0 {
                        self.idle.remove(&known.let_go);
                    }
                    known.holders += 1;
                    held.shared.push(*hash);
                }
                // Known, but behind one that is not: computed once more, and kept once.
                Some(_) => {}
                None => {
                    self.known.insert(*hash, Known { holders: 1, let_go: 0 });
                    held.shared.push(*hash);
                }
            }
        }
        held.private = blocks.saturating_sub(count(held.shared.len()));
        self.private += held.private;
        self.evict();
        Some((held, count(hits)))
    }

    /// Takes one block more. Whether there was one.
    pub fn grow(&mut self, held: &mut Held) -> bool {
        if self.held() >= self.capacity {
            return false;
        }
        held.private += 1;
        self.private += 1;
        self.evict();
        true
    }

    /// Lets blocks go; those of a prompt stay known.
    pub fn release(&mut self, held: Held) {
        self.private -= held.private;
        // The end first: a beginning is of use without its end, and an end is not without its beginning.
        for hash in held.shared.iter().rev() {
            let Some(known) = self.known.get_mut(hash) else { continue };
            known.holders -= 1;
            if known.holders == 0 {
                self.let_go += 1;
                known.let_go = self.let_go;
                self.idle.insert(self.let_go, *hash);
            }
        }
    }

    /// Forgets blocks that nobody holds until the others have room.
    fn evict(&mut self) {
        while count(self.known.len()).saturating_add(self.private) > self.capacity {
            let Some((_, hash)) = self.idle.pop_first() else { return };
            self.known.remove(&hash);
        }
    }

    /// Forgets all that nobody holds.
    pub fn forget(&mut self) {
        for hash in std::mem::take(&mut self.idle).into_values() {
            self.known.remove(&hash);
        }
    }
}

fn count(items: usize) -> u32 {
    u32::try_from(items).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn equal_beginnings_share_blocks_and_stay_known() {
        let mut kv = Kv::new(10);
        let (one, hits) = kv.take(&[1, 2, 3], 3, 4).unwrap();
        assert_eq!((hits, one.blocks()), (0, 4));
        let (two, hits) = kv.take(&[1, 2, 9], 3, 4).unwrap();
        assert_eq!((hits, kv.held()), (2, 6), "two of four are shared");
        kv.release(one);
        kv.release(two);
        assert_eq!(kv.held(), 0);
        let (three, hits) = kv.take(&[1, 2, 3], 2, 4).unwrap();
        assert_eq!((hits, three.blocks()), (2, 4), "no more hits than may count");
    }

    #[test]
    fn the_longest_unused_goes_first_and_ends_before_beginnings() {
        let mut kv = Kv::new(4);
        for hashes in [[1, 2], [3, 4]] {
            let (held, _) = kv.take(&hashes, 2, 2).unwrap();
            kv.release(held);
        }
        let (held, _) = kv.take(&[5], 1, 1).unwrap();
        kv.release(held);
        let hits = |kv: &mut Kv, hashes: &[u64]| {
            let (held, hits) = kv.take(hashes, 2, 2).unwrap();
            kv.release(held);
            hits
        };
        assert_eq!(hits(&mut kv, &[1, 2]), 1, "2 had to go for 5");
        assert_eq!(hits(&mut kv, &[3, 4]), 1, "and 4 for 2");
    }

    #[test]
    fn what_finds_no_room_takes_none() {
        let mut kv = Kv::new(3);
        let (mut held, _) = kv.take(&[1, 2], 2, 2).unwrap();
        assert!(kv.take(&[7, 8], 2, 2).is_none());
        assert!(kv.grow(&mut held));
        assert!(!kv.grow(&mut held));
        assert!((kv.usage() - 1.0).abs() < 1e-9);
        assert!(kv.take(&[1, 2], 2, 2).is_some(), "what is shared needs no room");
    }

    proptest! {
        #[test]
        fn there_are_never_more_blocks_than_there_are(
            steps in prop::collection::vec((0_u8..3, prop::collection::vec(0_u64..12, 0..6), 0_u32..3), 0..200)
        ) {
            let mut kv = Kv::new(16);
            let mut holders: Vec<Held> = Vec::new();
            for (what, mut hashes, more) in steps {
                hashes.dedup();
                let mut seen = std::collections::HashSet::new();
                hashes.retain(|hash| seen.insert(*hash));
                match (what, holders.len()) {
                    (1, 1..) => { let last = holders.len() - 1; kv.grow(&mut holders[last]); }
                    (2, 1..) => kv.release(holders.remove(0)),
                    _ => {
                        let blocks = count(hashes.len()) + more;
                        holders.extend(kv.take(&hashes, hashes.len(), blocks).map(|(held, _)| held));
                    }
                }
                prop_assert!(kv.held() <= 16);
                prop_assert!(count(kv.known.len()) + kv.private <= 16);
                let private: u32 = holders.iter().map(|held| held.private).sum();
                prop_assert_eq!(private, kv.private);
            }
            holders.drain(..).for_each(|held| kv.release(held));
            prop_assert_eq!(kv.held(), 0);
        }
    }
}
