//! In which order things are timed, and what is made of the samples. Time comes from whoever is timed: no clock is read here.

/// How long, how often.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Effort {
    /// Samples of each way that count.
    pub rounds: usize,
    /// Microseconds of work before them, at least.
    pub warm_up: f64,
    /// Microseconds after which the warm-up ends, settled or not.
    pub limit: f64,
}

/// Rounds of which the last is compared with those before, and how far apart they may be when clocks have settled.
const WINDOW: usize = 5;
const SETTLED: f64 = 0.005;

/// What was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Of each way, microseconds per run in each round.
    pub samples: Vec<Vec<f64>>,
    /// Whether the clocks had settled when the warm-up ended.
    pub settled: bool,
}

/// Times `ways` things in turn, round after round: what changes slowly (clocks, temperature) changes for all alike. Each
/// round begins with another, so that none always follows the same. `sample` returns the microseconds of one run and those
/// that the sample took in all.
pub fn interleaved<E>(
    ways: usize,
    effort: Effort,
    mut sample: impl FnMut(usize) -> Result<(f64, f64), E>,
) -> Result<Measured, E> {
    let mut round = |first: usize| -> Result<(Vec<f64>, f64), E> {
        let mut runs = vec![0.0; ways];
        let mut spent = 0.0;
        for turn in 0..ways {
            let way = (first + turn) % ways;
            let (run, all) = sample(way)?;
            runs[way] = run;
            spent += all;
        }
        Ok((runs, spent))
    };
    let (mut spent, mut totals, mut settled) = (0.0, Vec::new(), false);
    while ways > 0 && spent < effort.limit && !(settled && spent >= effort.warm_up) {
        let (runs, all) = round(totals.len())?;
        spent += all;
        totals.push(runs.iter().sum::<f64>());
        settled = is_settled(&totals);
    }
    let mut samples = vec![Vec::with_capacity(effort.rounds); ways];
    for number in 0..effort.rounds {
        for (of_way, run) in samples.iter_mut().zip(round(number)?.0) {
            of_way.push(run);
        }
    }
    Ok(Measured { samples, settled })
}

/// The last few rounds took as long as one another.
fn is_settled(totals: &[f64]) -> bool {
    let Some(from) = totals.len().checked_sub(WINDOW) else { return false };
    let (least, most) =
        totals[from..].iter().fold((f64::MAX, 0.0_f64), |(least, most), &x| (least.min(x), most.max(x)));
    most - least <= SETTLED * least
}

/// The value at `share` (0 to 1) of the sorted values, between neighbours where it falls between them; NaN of none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let at = share.clamp(0.0, 1.0) * sorted.len().saturating_sub(1) as f64;
    match (sorted.get(at.floor() as usize), sorted.get(at.ceil() as usize)) {
        (Some(low), Some(high)) => low + (high - low) * at.fract(),
        _ => f64::NAN,
    }
}

pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// (90th − 10th percentile) / median.
pub fn spread(values: &[f64]) -> f64 {
    (quantile(values, 0.9) - quantile(values, 0.1)) / median(values)
}

/// How much longer `way` takes than `baseline`: the median over rounds of their ratio, less one. Within a round both ran at
/// the same clocks.
pub fn tax(way: &[f64], baseline: &[f64]) -> f64 {
    let ratios: Vec<f64> = way.iter().zip(baseline).map(|(way, baseline)| way / baseline).collect();
    median(&ratios) - 1.0
}

/// The first element in which two results of the same product differ by more than the rounding of 16 bits and the order of an
/// f32 sum of `depth` terms in [−1, 1) allow.
pub fn disagreement(ours: &[f32], theirs: &[f32], depth: usize) -> Option<usize> {
    let sum = depth as f32 * f32::EPSILON;
    // NaN agrees with nothing.
    let agree = |(a, b): (&f32, &f32)| (a - b).abs() <= b.abs() / 64.0 + sum;
    if ours.len() != theirs.len() {
        return Some(ours.len().min(theirs.len()));
    }
    ours.iter().zip(theirs).position(|pair| !agree(pair))
}
