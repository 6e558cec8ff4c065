//! A Llama as transformers computes it: RMS norms, the rotary embedding, the softmax and the loss in f32, the rest in the
//! weights' type.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Result as Computed, Tensor};
use candle_nn::kv_cache::ConcatKvCache;
use candle_nn::ops::rms_norm_slow;
use candle_nn::rotary_emb::rope_slow;

use super::config::Config;
use super::failure::{Failure, Result};
use super::linear::{Linear, Lora};
use super::weights::Weights;

/// What to put in place of or beside the weights on disk.
#[derive(Default)]
pub struct Changes {
    /// By module.
    pub lora: BTreeMap<String, Lora>,
    /// Whole weights and biases that an adapter brings, by their name in the model.
    pub parameters: BTreeMap<String, Tensor>,
}

pub struct Llama {
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Norm,
    head: Linear,
    rotary: Rotary,
    dtype: DType,
}

struct Layer {
    input_norm: Norm,
    attention: Attention,
    attention_norm: Norm,
    mlp: Mlp,
}

struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

struct Norm {
    weight: Tensor,
    eps: f32,
}

/// Keys and values of the tokens seen so far, per layer.
pub struct Cache(Vec<ConcatKvCache>);

impl Cache {
    pub fn new(config: &Config) -> Self {
        const POSITIONS: usize = 2; // of batch, heads, positions, head_dim
        Self((0..config.layers).map(|_| ConcatKvCache::new(POSITIONS)).collect())
    }

    fn len(&self) -> usize {
        self.0.first().map_or(0, ConcatKvCache::current_seq_len)
    }
}

/// The output layer, which PEFT's `all-linear` leaves out.
pub const HEAD: &str = "lm_head";

/// The embedding's weight, the head's as well where they are tied.
pub const EMBEDDING: &str = "model.embed_tokens.weight";

/// Every linear layer, with N and K.
pub fn linear_layers(config: &Config) -> Vec<(String, usize, usize)> {
    let mut layers = Vec::new();
    for layer in 0..config.layers {
        for (name, n, k) in projections(config) {
            layers.push((format!("model.layers.{layer}.{name}"), n, k));
        }
    }
    layers.push((HEAD.into(), config.vocab, config.hidden));
    layers
}

fn projections(config: &Config) -> [(&'static str, usize, usize); 7] {
    let (hidden, wide) = (config.hidden, config.intermediate);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    [
        ("self_attn.q_proj", q, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, q),
        ("mlp.gate_proj", wide, hidden),
        ("mlp.up_proj", wide, hidden),
        ("mlp.down_proj", hidden, wide),
    ]
}

/// Takes parts from the files and from the changes, until none of the changes is left.
struct Source<'a> {
    weights: &'a Weights,
    changes: Changes,
}

impl Source<'_> {
    fn get(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match self.change(name, shape)? {
            None => self.weights.get(name, shape),
            Some(value) => Ok(value.to_dtype(self.weights.dtype)?),
        }
    }

    /// An adapter's bias stays the tensor that it is: it may be a variable.
    fn bias(&mut self, name: &str, n: usize) -> Result<Tensor> {
        self.change(name, &[n])?.map_or_else(|| self.weights.get(name, &[n]), Ok)
    }

    fn change(&mut self, name: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        match self.changes.parameters.remove(name) {
            Some(value) if value.dims() != shape => {
                let got = value.dims();
                Err(Failure::Usage(format!("the adapter's `{name}` has shape {got:?}, but the model's is {shape:?}")))
            }
            value => Ok(value),
        }
    }

    fn linear(&mut self, module: &str, n: usize, k: usize, bias: bool) -> Result<Linear> {
        let w = self.get(&format!("{module}.weight"), &[n, k])?;
        self.linear_over(module, w, bias)
    }

    fn linear_over(&mut self, module: &str, w: Tensor, bias: bool) -> Result<Linear> {
        let n = w.dim(0)?;
        let bias = if bias { Some(self.bias(&format!("{module}.bias"), n)?) } else { None };
        let lora = self.changes.lora.remove(module);
        Ok(Linear { w, bias, lora })
    }

    fn norm(&mut self, module: &str, config: &Config) -> Result<Norm> {
        Ok(Norm { weight: self.get(&format!("{module}.weight"), &[config.hidden])?, eps: config.norm_eps as f32 })
    }

    fn layer(&mut self, index: usize, config: &Config) -> Result<Layer> {
        let prefix = format!("model.layers.{index}");
        let input_norm = self.norm(&format!("{prefix}.input_layernorm"), config)?;
        let attention_norm = self.norm(&format!("{prefix}.post_attention_layernorm"), config)?;
        let mut linears = Vec::new();
        for (name, n, k) in projections(config) {
            let bias = if name.starts_with("mlp") { config.mlp_bias } else { config.attention_bias };
            linears.push(self.linear(&format!("{prefix}.{name}"), n, k, bias)?);
        }
        let linears: [Linear; 7] = linears.try_into().map_err(|_| Failure::NotBuilt("another layer".into()))?;
        let [q, k, v, o, gate, up, down] = linears;
        let Config { heads, kv_heads, head_dim, .. } = *config;
        let attention = Attention { q, k, v, o, heads, kv_heads, head_dim };
        Ok(Layer { input_norm, attention, attention_norm, mlp: Mlp { gate, up, down } })
    }
}

impl Llama {
    pub fn load(config: &Config, weights: &Weights, changes: Changes) -> Result<Self> {
        let mut source = Source { weights, changes };
        let shape = [config.vocab, config.hidden];
        let own_embedding = source.changes.parameters.contains_key(EMBEDDING);
        let embedding = source.get(EMBEDDING, &shape)?;
        let layers = (0..config.layers).map(|index| source.layer(index, config)).collect::<Result<_>>()?;
        let norm = source.norm("model.norm", config)?;
        // An adapter that brings a head of its own unties it; one that brings an embedding alone leaves the head the model's.
        let head = if config.tied && !source.changes.parameters.contains_key("lm_head.weight") {
            let w = if own_embedding { weights.get(EMBEDDING, &shape)? } else { embedding.clone() };
            source.linear_over(HEAD, w, false)?
        } else {
            source.linear(HEAD, config.vocab, config.hidden, false)?
        };
        if let Some(module) = source.changes.lora.keys().chain(source.changes.parameters.keys()).next() {
            return Err(Failure::Usage(format!("the adapter brings `{module}`, which the model does not have")));
        }
        let rotary = Rotary { frequencies: config.rope.frequencies(config.head_dim), device: weights.device.clone() };
        Ok(Self { embedding, layers, norm, head, rotary, dtype: weights.dtype })
    }

    /// The last hidden states (B × T × hidden) of ids (B × T), which follow the tokens in the cache. `pass` is the number of the
    /// training pass, `None` for inference.
    pub fn hidden(&self, ids: &Tensor, mut cache: Option<&mut Cache>, pass: Option<u64>) -> Computed<Tensor> {
        let (batch, length) = ids.dims2()?;
        let seen = cache.as_ref().map_or(0, |cache| cache.len());
        let (cos, sin) = self.rotary.angles(seen, length)?;
        let mask = causal_mask(seen, length, ids.device())?;
        let mut x = self.embedding.index_select(&ids.flatten_all()?, 0)?.reshape((batch, length, ()))?;
        for (index, layer) in self.layers.iter().enumerate() {
            let cache = cache.as_mut().and_then(|cache| cache.0.get_mut(index));
            let shared = Shared { cos: &cos, sin: &sin, mask: &mask, pass };
            let attended = layer.attention.forward(&layer.input_norm.forward(&x)?, shared, cache)?;
            x = (x + attended)?;
            x = (&x + layer.mlp.forward(&layer.attention_norm.forward(&x)?, pass)?)?;
        }
        self.norm.forward(&x)
    }

    /// Logits of hidden states, in f32.
    pub fn logits(&self, hidden: &Tensor, pass: Option<u64>) -> Computed<Tensor> {
        self.head.forward(hidden, pass)?.to_dtype(DType::F32)
    }

    /// Mean cross entropy (f32 scalar) of each token given those before it. ids and labels are B × T, row-major; a label
    /// of [`IGNORED`] counts for nothing, nor does the first of a row. For training, in the pass of that number.
    pub fn loss(&self, ids: &[u32], labels: &[i64], (batch, length): (usize, usize), pass: u64) -> Computed<Tensor> {
        let device = self.embedding.device();
        let ids = Tensor::from_slice(ids, (batch, length), device)?;
        let mut rows = Vec::new(); // of the hidden states, B · T in all
        let mut targets = Vec::new();
        for (at, label) in counted(labels, length) {
            rows.push((at - 1) as u32);
            targets.push(label as u32);
        }
        if rows.is_empty() {
            candle_core::bail!("every label is ignored, expected at least one that counts");
        }
        let count = rows.len();
        let rows = Tensor::from_vec(rows, count, device)?;
        let pass = Some(pass);
        let hidden = self.hidden(&ids, None, pass)?.flatten_to(1)?.index_select(&rows, 0)?;
        let logits = self.logits(&hidden, pass)?;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
        let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let chosen = shifted.gather(&Tensor::from_vec(targets, (count, 1), device)?, 1)?;
        (log_sum - chosen)?.mean_all()
    }

    /// Puts every adapter into the weight beside it.
    pub fn merge(&mut self) -> Computed<()> {
        for Layer { attention: Attention { q, k, v, o, .. }, mlp: Mlp { gate, up, down }, .. } in &mut self.layers {
            [q, k, v, o, gate, up, down].into_iter().try_for_each(Linear::merge)?;
        }
        self.head.merge()
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

/// The label of a token that is not to be learnt.
pub const IGNORED: i64 = -100;

/// The labels that count in rows of `length`, with their places.
pub fn counted(labels: &[i64], length: usize) -> impl Iterator<Item = (usize, i64)> {
    labels.iter().copied().enumerate().filter(move |&(at, label)| at % length != 0 && label != IGNORED)
}

impl Norm {
    fn forward(&self, x: &Tensor) -> Computed<Tensor> {
        rms_norm_slow(x, &self.weight, self.eps) // the differentiable one
    }
}

impl Mlp {
    fn forward(&self, x: &Tensor, pass: Option<u64>) -> Computed<Tensor> {
        self.down.forward(&(self.gate.forward(x, pass)?.silu()? * self.up.forward(x, pass)?)?, pass)
    }
}

/// What the layers of a pass share.
struct Shared<'a> {
    cos: &'a Tensor,
    sin: &'a Tensor,
    mask: &'a Tensor,
    pass: Option<u64>,
}

impl Attention {
    fn forward(&self, x: &Tensor, shared: Shared<'_>, cache: Option<&mut ConcatKvCache>) -> Computed<Tensor> {
        let Shared { cos, sin, mask, pass } = shared;
        let (batch, length, _) = x.dims3()?;
        let &Self { heads, kv_heads, head_dim, .. } = self;
        let split = |y: Tensor, heads| y.reshape((batch, length, heads, head_dim))?.transpose(1, 2)?.contiguous();
        let turn = |y: Tensor| rope_slow(&y.to_dtype(DType::F32)?, cos, sin)?.to_dtype(x.dtype());
        let q = turn(split(self.q.forward(x, pass)?, heads)?)?;
        let mut k = turn(split(self.k.forward(x, pass)?, kv_heads)?)?;
        let mut v = split(self.v.forward(x, pass)?, kv_heads)?;
        if let Some(cache) = cache {
            (k, v) = cache.append(&k, &v)?;
        }
        // The query heads that share a key head are rows of one product.
        let grouped = (batch, kv_heads, heads / kv_heads * length, ());
        let scores = q.reshape(grouped)?.matmul(&k.t()?.contiguous()?)?;
        let scores = (scores.to_dtype(DType::F32)? / (head_dim as f64).sqrt())?;
        let weights = softmax(&scores.reshape((batch, heads, length, ()))?.broadcast_add(mask)?)?;
        let y = weights.to_dtype(x.dtype())?.reshape(grouped)?.matmul(&v.contiguous()?)?;
        let y = y.reshape((batch, heads, length, head_dim))?.transpose(1, 2)?;
        self.o.forward(&y.reshape((batch, length, heads * head_dim))?, pass)
    }
}

/// Over the last dimension; the largest value is shifted to 0 without a gradient of its own.
fn softmax(x: &Tensor) -> Computed<Tensor> {
    let exp = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

/// Added to the scores of `length` tokens after `seen` others: 0 for those up to the token itself, -∞ beyond.
fn causal_mask(seen: usize, length: usize, device: &Device) -> Computed<Tensor> {
    let all = seen + length;
    let row = |token| (0..all).map(move |other| if other > seen + token { f32::NEG_INFINITY } else { 0.0 });
    Tensor::from_iter((0..length).flat_map(row), device)?.reshape((length, all))
}

struct Rotary {
    frequencies: Vec<f32>,
    device: Device,
}

impl Rotary {
    /// cos and sin (T × head_dim / 2) of the positions from `start` on.
    fn angles(&self, start: usize, length: usize) -> Computed<(Tensor, Tensor)> {
        let angle = |position| self.frequencies.iter().map(move |frequency| position as f32 * frequency);
        let angles: Vec<f32> = (start..start + length).flat_map(angle).collect();
        let angles = Tensor::from_vec(angles, (length, self.frequencies.len()), &self.device)?;
        Ok((angles.cos()?, angles.sin()?))
    }
}
