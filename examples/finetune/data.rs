//! What is trained on: text cut into pieces, or recorded batches.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::common::failure::{Failure, Result};
use super::common::llama::IGNORED;
use super::common::rng::Rng;
use super::common::tokens::Tokens;

/// Tokens of one step: their numbers are u32, their logits could be held nowhere.
const MAX_TOKENS: usize = 1 << 31;

/// B × T tokens, row-major, and their labels.
pub struct Batch {
    pub ids: Vec<u32>,
    pub labels: Vec<i64>,
}

/// Batches by number. Batch i is a function of the data, the seed and i alone: a run that resumes needs to know nothing
/// but i.
pub struct Data {
    kind: Kind,
    pub batch: usize,
    pub seq: usize,
}

enum Kind {
    /// `steps` batches of B · T.
    Recorded {
        ids: Vec<u32>,
        labels: Vec<i64>,
        steps: usize,
    },
    Text {
        tokens: Vec<u32>,
        seed: u64,
        order: Order,
    },
}

/// Piece numbers in the order of one epoch.
#[derive(Default)]
struct Order {
    epoch: Option<usize>,
    pieces: Vec<usize>,
}

/// What the flags ask for.
pub struct Shape {
    pub batch: Option<usize>,
    pub seq: Option<usize>,
    pub seed: u64,
    pub vocab: usize,
}

impl Data {
    pub fn open(path: &Path, tokens: &Tokens, shape: &Shape) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| Failure::malformed(path, error))?;
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            return Self::recorded(path, &bytes, shape);
        }
        let (batch, seq) = (shape.batch.unwrap_or(4), shape.seq.unwrap_or(128));
        if batch.checked_mul(seq).is_none_or(|tokens| tokens > MAX_TOKENS) {
            let problem =
                format!("`--batch` is {batch} with `--seq` {seq}, expected at most {MAX_TOKENS} tokens a step");
            return Err(Failure::Usage(problem));
        }
        let tokens = tokens.encode(&bytes, &path.display().to_string(), shape.vocab, false)?;
        if tokens.len() < seq {
            let problem = format!("holds {} tokens, expected at least one sequence, `--seq` {seq}", tokens.len());
            return Err(Failure::malformed(path, problem));
        }
        Ok(Self { kind: Kind::Text { tokens, seed: shape.seed, order: Order::default() }, batch, seq })
    }

    fn recorded(path: &Path, bytes: &[u8], shape: &Shape) -> Result<Self> {
        let malformed = |problem: String| Failure::malformed(path, problem);
        let file = candle_core::safetensors::load_buffer(bytes, &Device::Cpu);
        let file = file.map_err(|error| malformed(error.to_string()))?;
        let tensor = file.get("input_ids").ok_or_else(|| malformed("holds no tensor `input_ids`".into()))?;
        let dims = tensor.dims().to_vec();
        let (steps, batch, seq) = match dims[..] {
            [steps, batch, seq] if steps > 0 && batch > 0 && seq > 1 => (steps, batch, seq),
            _ => return Err(malformed(format!("`input_ids` has shape {dims:?}, expected [steps, batch, seq ≥ 2]"))),
        };
        for (flag, given, recorded) in [("batch", shape.batch, batch), ("seq", shape.seq, seq)] {
            if let Some(given) = given.filter(|&given| given != recorded) {
                return Err(Failure::Usage(format!("`--{flag}` is {given}, but {recorded} is recorded in the data")));
            }
        }
        let ids = integers(tensor, "input_ids").map_err(malformed)?;
        let known = |id: &i64| (0..shape.vocab as i64).contains(id);
        if let Some(id) = ids.iter().find(|id| !known(id)) {
            return Err(malformed(format!("`input_ids` holds {id}, expected tokens below {}", shape.vocab)));
        }
        let labels = match file.get("labels") {
            None => ids.clone(),
            Some(labels) if labels.dims() == dims => integers(labels, "labels").map_err(malformed)?,
            Some(labels) => {
                return Err(malformed(format!("`labels` has shape {:?}, expected {dims:?}", labels.dims())));
            }
        };
        if let Some(label) = labels.iter().find(|&label| *label != IGNORED && !known(label)) {
            let problem = format!("`labels` holds {label}, expected {IGNORED} or tokens below {}", shape.vocab);
            return Err(malformed(problem));
        }
        let counts = |labels: &[i64]| labels.chunks(seq).any(|row| row[1..].iter().any(|&label| label != IGNORED));
        if let Some(step) = labels.chunks(batch * seq).position(|labels| !counts(labels)) {
            return Err(malformed(format!("every label of step {step} is ignored, expected at least one that counts")));
        }
        let ids = ids.iter().map(|&id| id as u32).collect();
        Ok(Self { kind: Kind::Recorded { ids, labels, steps }, batch, seq })
    }

    /// How many batches there are, where the data ends.
    pub fn batches(&self) -> Option<usize> {
        match self.kind {
            Kind::Recorded { steps, .. } => Some(steps),
            Kind::Text { .. } => None,
        }
    }

    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::Recorded { steps, .. } => format!("{steps} recorded batches"),
            Kind::Text { tokens, .. } => {
                format!("{} tokens of text in {} pieces", tokens.len(), tokens.len() / self.seq)
            }
        }
    }

    /// FNV-1a over everything the batches are made of, to tell one text from another.
    pub fn digest(&self) -> u64 {
        let (ids, labels) = match &self.kind {
            Kind::Recorded { ids, labels, .. } => (ids, &labels[..]),
            Kind::Text { tokens, .. } => (tokens, &[][..]),
        };
        let words = ids.iter().map(|&id| u64::from(id)).chain(labels.iter().map(|&label| label as u64));
        words.fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ word).wrapping_mul(0x100_0000_01b3))
    }

    /// Batch `at`, which must be below [`Data::batches`] where the data ends.
    pub fn batch(&mut self, at: usize) -> Batch {
        let (batch, seq) = (self.batch, self.seq);
        match &mut self.kind {
            Kind::Recorded { ids, labels, .. } => {
                let range = at * batch * seq..(at + 1) * batch * seq;
                Batch { ids: ids[range.clone()].to_vec(), labels: labels[range].to_vec() }
            }
            Kind::Text { tokens, seed, order } => {
                let pieces = tokens.len() / seq;
                let mut ids = Vec::with_capacity(batch * seq);
                for drawn in at * batch..(at + 1) * batch {
                    let piece = order.of(drawn / pieces, pieces, *seed)[drawn % pieces];
                    ids.extend_from_slice(&tokens[piece * seq..(piece + 1) * seq]);
                }
                let labels = ids.iter().map(|&id| id.into()).collect();
                Batch { ids, labels }
            }
        }
    }
}

impl Order {
    fn of(&mut self, epoch: usize, pieces: usize, seed: u64) -> &[usize] {
        if self.epoch != Some(epoch) {
            self.pieces = (0..pieces).collect();
            // The seed's own stream gives each epoch a stream of its own.
            let mut seeds = Rng::new(seed);
            Rng::new(seeds.next_u64() ^ epoch as u64).shuffle(&mut self.pieces);
            self.epoch = Some(epoch);
        }
        &self.pieces
    }
}

fn integers(tensor: &Tensor, name: &str) -> Result<Vec<i64>, String> {
    if !tensor.dtype().is_int() {
        return Err(format!("`{name}` is {:?}, expected integers", tensor.dtype()));
    }
    let flat = tensor.flatten_all().and_then(|flat| flat.to_dtype(DType::I64)).and_then(|flat| flat.to_vec1());
    flat.map_err(|error| format!("`{name}`: {error}"))
}
