//! An engine that batches continuously, as vLLM does, with a time of its own.
//!
//! It works in steps. A step gives each running sequence its next token and spends what is left of its tokens on
//! prompts; it takes as long as both need, and then the next begins. Sequences are admitted in order of priority (the
//! lower first) and then of arrival, while there is a slot and room for the whole prompt in the KV cache; nobody passes
//! the first that finds none. A sequence that needs a block where there is none puts out the last in that order, which
//! begins anew later. Beside these run sequences whose times are given: they take slots, and nothing else.
//!
//! Sans-IO: the time comes in with each call, and what happened is told with the time at which it did.
//!
//! Invariant: a sequence that is submitted ends, told once, unless it is cancelled; a slot is free from the moment at which
//! its sequence ended, however late that is noticed.

mod kv;

use crate::dice::whole;
use kv::{Held, Kv};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

/// Microseconds since the engine began.
pub type Micros = u64;

/// How fast an engine is and how much fits into it.
#[derive(Clone, Debug, PartialEq)]
pub struct Pace {
    /// Tokens of prompts a second.
    pub prefill_per_s: f64,
    /// Tokens a second of a sequence that runs alone.
    pub decode_per_s: f64,
    /// By which part of itself a step becomes longer with each further sequence.
    pub decode_slowdown: f64,
    /// The most sequences that run (`max_num_seqs`).
    pub slots: u32,
    /// The most tokens of a step (`max_num_batched_tokens`).
    pub step_tokens: u32,
}

/// The order of sequences: priority, then arrival. So it is also the name of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    priority: i64,
    arrival: u64,
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Job {
    /// The lower goes first.
    pub priority: i64,
    /// How many tokens it writes; none for an embedding.
    pub output: u32,
    /// What it takes.
    pub work: Work,
}

/// What a job takes.
#[derive(Clone, Debug)]
pub enum Work {
    /// What the model says.
    Modelled {
        /// The tokens of its prompt.
        prompt: u32,
        /// The hashes of the full blocks of the prompt.
        blocks: Vec<u64>,
    },
    /// The times are given.
    Timed {
        /// Until the first token, or the end where there is none.
        first: Micros,
        /// From one token to the next.
        gap: Micros,
    },
}

/// What happened to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// To which.
    pub id: Id,
    /// When.
    pub at: Micros,
    /// What.
    pub what: What,
}

/// What happens to jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It runs; so many tokens of its prompt were known.
    Admitted(u32),
    /// So many tokens are written in all.
    Written(u32),
    /// It is done.
    Done,
}

/// What an engine counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tokens of prompts that were looked up in the KV cache.
    pub prefix_queries: u64,
    /// Those that were found there.
    pub prefix_hits: u64,
    /// Sequences that were put out.
    pub preemptions: u64,
}

struct Sequence {
    prompt: u32,
    blocks: Vec<u64>,
    output: u32,
    written: u32,
    /// Tokens to be computed before the next is written, and those that are.
    wanted: u32,
    computed: u32,
    held: Held,
}

struct TimedSequence {
    output: u32,
    written: u32,
    gap: Micros,
}

enum Waiting {
    Modelled(Sequence),
    Timed { output: u32, first: Micros, gap: Micros },
}

struct Step {
    ends: Micros,
    /// Who gets how many tokens of its prompt computed.
    prefills: Vec<(Id, u32)>,
    decodes: Vec<Id>,
}

/// An engine.
pub struct Engine {
    pace: Pace,
    block_tokens: u32,
    kv: Kv,
    arrivals: u64,
    waiting: BTreeMap<Id, Waiting>,
    running: BTreeMap<Id, Sequence>,
    timed: BTreeMap<Id, TimedSequence>,
    /// When timed sequences go on.
    due: BinaryHeap<Reverse<(Micros, Id)>>,
    step: Option<Step>,
    counts: Counts,
}

impl Engine {
    /// An engine whose KV cache has so many blocks of so many tokens.
    pub fn new(pace: Pace, kv_blocks: u32, block_tokens: u32) -> Self {
        Self {
            pace,
            block_tokens: block_tokens.max(1),
            kv: Kv::new(kv_blocks),
            arrivals: 0,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            timed: BTreeMap::new(),
            due: BinaryHeap::new(),
            step: None,
            counts: Counts::default(),
        }
    }

    /// From the next step on it goes at this pace.
    pub fn set_pace(&mut self, pace: Pace) {
        self.pace = pace;
    }

    /// Forgets the prompts that it kept.
    pub fn forget(&mut self) {
        self.kv.forget();
    }

    /// How many run.
    pub fn running(&self) -> usize {
        self.running.len() + self.timed.len()
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The part of the KV cache that is held.
    pub fn kv_usage(&self) -> f64 {
        self.kv.usage()
    }

    /// What it counted so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// When something happens next, if nothing comes in.
    pub fn next(&self) -> Option<Micros> {
        let step = self.step.as_ref().map(|step| step.ends);
        let due = self.due.peek().map(|Reverse((at, _))| *at);
        step.into_iter().chain(due).min()
    }

    /// Takes a job in.
    pub fn submit(&mut self, now: Micros, job: Job, told: &mut Vec<Told>) -> Id {
        self.advance(now, told);
        let id = Id { priority: job.priority, arrival: self.arrivals };
        self.arrivals += 1;
        let waiting = match job.work {
            Work::Timed { first, gap } => Waiting::Timed { output: job.output, first, gap },
            Work::Modelled { prompt, blocks } => Waiting::Modelled(Sequence {
                // A prompt of nothing has still its beginning.
                prompt: prompt.max(1),
                blocks,
                output: job.output,
                written: 0,
                wanted: prompt.max(1),
                computed: 0,
                held: Held::default(),
            }),
        };
        self.waiting.insert(id, waiting);
        self.go_on(now, told);
        id
    }

    /// Gives a job up; one that is done already is none.
    pub fn cancel(&mut self, now: Micros, id: Id, told: &mut Vec<Told>) {
        self.advance(now, told);
        self.waiting.remove(&id);
        self.timed.remove(&id);
        if let Some(sequence) = self.running.remove(&id) {
            self.kv.release(sequence.held);
        }
        self.go_on(now, told);
    }

    /// Lets all happen that happens until then.
    pub fn advance(&mut self, now: Micros, told: &mut Vec<Told>) {
        while let Some(at) = self.next().filter(|at| *at <= now) {
            if self.due.peek().is_some_and(|Reverse((due, _))| *due == at) {
                let Some(Reverse((_, id))) = self.due.pop() else { return };
                self.go_on_timed(at, id, told);
            } else if let Some(step) = self.step.take() {
                self.end(step, told);
            }
            self.go_on(at, told);
        }
    }

    fn go_on(&mut self, now: Micros, told: &mut Vec<Told>) {
        self.admit(now, told);
        if self.step.is_none() {
            self.step = self.begin(now);
        }
    }

    fn admit(&mut self, now: Micros, told: &mut Vec<Told>) {
        let slots = usize::try_from(self.pace.slots.max(1)).unwrap_or(usize::MAX);
        while self.running() < slots
            && let Some(first) = self.waiting.first_entry()
        {
            let id = *first.key();
            let mut sequence = match first.remove() {
                Waiting::Timed { output, first, gap } => {
                    told.push(Told { id, at: now, what: What::Admitted(0) });
                    self.timed.insert(id, TimedSequence { output, written: 0, gap });
                    match first {
                        0 => self.go_on_timed(now, id, told),
                        _ => self.due.push(Reverse((now.saturating_add(first), id))),
                    }
                    continue;
                }
                Waiting::Modelled(sequence) => sequence,
            };
            let wanted = sequence.prompt.saturating_add(sequence.written);
            // The last token is always computed: what comes next follows from it.
            let hits_max = usize::try_from((sequence.prompt - 1) / self.block_tokens).unwrap_or(usize::MAX);
            let blocks = wanted.div_ceil(self.block_tokens);
            let Some((held, hits)) = self.kv.take(&sequence.blocks, hits_max, blocks) else {
                self.waiting.insert(id, Waiting::Modelled(sequence));
                return;
            };
            let cached = hits.saturating_mul(self.block_tokens);
            self.counts.prefix_queries += u64::from(sequence.prompt);
            self.counts.prefix_hits += u64::from(cached);
            (sequence.held, sequence.wanted, sequence.computed) = (held, wanted, cached);
            told.push(Told { id, at: now, what: What::Admitted(cached) });
            self.running.insert(id, sequence);
        }
    }

    fn go_on_timed(&mut self, at: Micros, id: Id, told: &mut Vec<Told>) {
        // One that was cancelled is gone.
        let Some(sequence) = self.timed.get_mut(&id) else { return };
        if sequence.output > 0 {
            sequence.written = if sequence.gap == 0 { sequence.output } else { sequence.written + 1 };
            told.push(Told { id, at, what: What::Written(sequence.written) });
        }
        if sequence.written < sequence.output {
            self.due.push(Reverse((at.saturating_add(sequence.gap), id)));
        } else {
            self.timed.remove(&id);
            told.push(Told { id, at, what: What::Done });
        }
    }

    /// The next step, where there is something to do.
    fn begin(&mut self, now: Micros) -> Option<Step> {
        let decodes = self.with_room();
        let decoding = u32::try_from(decodes.len()).unwrap_or(u32::MAX);
        let mut left = self.pace.step_tokens.saturating_sub(decoding).max(1);
        let mut prefills = Vec::new();
        for (id, sequence) in &self.running {
            let tokens = (sequence.wanted - sequence.computed).min(left);
            if tokens > 0 {
                prefills.push((*id, tokens));
                left -= tokens;
            }
        }
        if decodes.is_empty() && prefills.is_empty() {
            return None;
        }
        let prefilling: u32 = prefills.iter().map(|(_, tokens)| tokens).sum();
        let mut seconds = f64::from(prefilling) / self.pace.prefill_per_s;
        if decoding > 0 {
            let slowed = 1.0 + self.pace.decode_slowdown * f64::from(decoding - 1);
            seconds += slowed / self.pace.decode_per_s;
        }
        // No step takes no time, or nothing would come to an end.
        let ends = now.saturating_add(whole(seconds * 1e6).max(1));
        Some(Step { ends, prefills, decodes })
    }

    /// Who writes a token in the next step. Each has a block for it; who has to make room for that is put out.
    fn with_room(&mut self) -> Vec<Id> {
        let ready: Vec<Id> =
            self.running.iter().filter(|(_, s)| s.computed == s.wanted).map(|(id, _)| *id).collect();
        let mut decodes = Vec::with_capacity(ready.len());
        for id in ready {
            while let Some(sequence) = self.running.get_mut(&id) {
                let blocks = sequence.prompt.saturating_add(sequence.written).div_ceil(self.block_tokens);
                if sequence.held.blocks() >= blocks || self.kv.grow(&mut sequence.held) {
                    decodes.push(id);
                    break;
                }
                self.put_last_out();
            }
        }
        decodes
    }

    fn put_last_out(&mut self) {
        let Some((id, mut sequence)) = self.running.pop_last() else { return };
        self.kv.release(std::mem::take(&mut sequence.held));
        self.counts.preemptions += 1;
        self.waiting.insert(id, Waiting::Modelled(sequence));
    }

    fn end(&mut self, Step { ends: at, prefills, decodes }: Step, told: &mut Vec<Told>) {
        let computed = prefills.into_iter().filter_map(|(id, tokens)| {
            // One that was cancelled meanwhile is gone.
            let sequence = self.running.get_mut(&id)?;
            sequence.computed += tokens;
            // The last token of the prompt brings the first of the answer.
            (sequence.computed == sequence.wanted).then_some(id)
        });
        let computed: Vec<Id> = computed.collect();
        for id in decodes.into_iter().chain(computed) {
            let Some(sequence) = self.running.get_mut(&id) else { continue };
            if sequence.output > 0 {
                sequence.written += 1;
                told.push(Told { id, at, what: What::Written(sequence.written) });
            }
            if sequence.written >= sequence.output
                && let Some(sequence) = self.running.remove(&id)
            {
                self.kv.release(sequence.held);
                told.push(Told { id, at, what: What::Done });
            }
        }
    }
}

#[cfg(test)]
mod tests;
