//! The next token from its logits.

use super::common::rng::Rng;

/// How to choose.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the likeliest token.
    pub temperature: f64,
    /// Only the likeliest so many are in question.
    pub top_k: Option<usize>,
    /// Only the likeliest whose probabilities make up this much.
    pub top_p: Option<f64>,
}

impl Sampling {
    /// A token number, None where no logit is a number.
    pub fn choose(&self, logits: &[f32], rng: &mut Rng) -> Option<u32> {
        let mut order: Vec<usize> = (0..logits.len()).filter(|&token| !logits[token].is_nan()).collect();
        // The lower number among equals, so that the result does not depend on the sort.
        order.sort_by(|&one, &other| logits[other].total_cmp(&logits[one]).then(one.cmp(&other)));
        let best = *order.first()?;
        if self.temperature == 0.0 {
            return u32::try_from(best).ok();
        }
        order.truncate(self.top_k.unwrap_or(order.len()));
        let weight = |&token: &usize| (f64::from(logits[token] - logits[best]) / self.temperature).exp();
        let weights: Vec<f64> = order.iter().map(weight).collect();
        let mut total: f64 = weights.iter().sum();
        if let Some(top_p) = self.top_p {
            let mut kept = 0.0;
            let needed = top_p * total;
            let last = weights.iter().position(|weight| {
                kept += weight;
                kept >= needed
            });
            order.truncate(last.map_or(order.len(), |last| last + 1));
            total = weights[..order.len()].iter().sum();
        }
        let mut left = rng.uniform() * total;
        let chosen = order.iter().zip(&weights).find(|(_, weight)| {
            left -= *weight;
            left < 0.0
        });
        // Rounding may leave a remainder beyond the last.
        let token = chosen.map(|(&token, _)| token).or_else(|| order.last().copied())?;
        u32::try_from(token).ok()
    }
}
