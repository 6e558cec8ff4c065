//! The planner's choices, ticket by ticket.
#![allow(clippy::panic)] // helpers of tests fail as tests do

use super::model::{Alters, Machine, MainTile};
use super::{TILES, Tile};
use crate::params::*;
use crate::plan::{Choice, Device, Plan};
use crate::{Accumulate, Dtype, LoraShape, raw};

/// Layers of models with 8 to 70 billion parameters, as (N, K).
const LAYERS: [(usize, usize); 5] = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (8192, 8192)];

fn at(index: u64, rows: usize, cols: usize) -> raw::Matrix {
    raw::Matrix::new(index << 50, rows, cols)
}

fn forward(LoraShape { m, n, k, r }: LoraShape) -> raw::Forward {
    raw::Forward {
        dtype: Dtype::Bf16,
        x: at(1, m, k),
        w: at(2, n, k),
        f32_factors: false,
        a: at(3, r, k),
        b: at(4, n, r),
        scale: 2.0,
        bias: None,
        h: Some(at(5, m, r)),
        y: at(6, m, n),
        variant: raw::Variant::default(),
    }
}

fn backward(LoraShape { m, n, k, r }: LoraShape) -> raw::Backward {
    let gradient = |matrix| Some(raw::Gradient { matrix, f32: true });
    raw::Backward {
        dtype: Dtype::Bf16,
        dy: at(1, m, n),
        w: at(2, n, k),
        f32_factors: false,
        a: at(3, r, k),
        b: at(4, n, r),
        scale: 2.0,
        x: Some(at(5, m, k)),
        h: Some(at(6, m, r)),
        dx: Some(at(7, m, k)),
        da: gradient(at(8, r, k)),
        db: gradient(at(9, n, r)),
        dbias: gradient(at(10, 1, n)),
        dm: None,
        accumulate: Accumulate::default(),
        variant: raw::Variant::default(),
    }
}

/// Dropout of one element in ten.
fn dropping() -> raw::Variant {
    let dropout = Some(raw::Dropout { p: 0.1, seed: raw::Seed::Value { seed: 1, offset: 2 } });
    raw::Variant { dropout, ..raw::Variant::default() }
}

/// DoRA over `n` columns.
fn gaining(n: usize) -> raw::Variant {
    raw::Variant { gain: Some(at(11, 1, n)), ..raw::Variant::default() }
}

/// What a simulation needs to know about a plan.
struct Tickets {
    groups: u32,
    columns: u32,
    units: u32,
    tickets: u32,
    group_m: u32,
    depth: u32,
    rank: u32,
    /// What happens to the rows that its units of h read, and to those of main tiles.
    alters: [Alters; 2],
}

fn tickets(plan: &Plan) -> (Tickets, Tile, Machine, MainTile) {
    let Choice::Sm90(choice) = plan.choice else { panic!("not the Hopper family:\n{}", plan.explain()) };
    let tickets = match plan.launch.params {
        Params::Sm90Forward(p) => Tickets {
            groups: p.m_groups,
            columns: p.n_blocks,
            units: p.h_units,
            tickets: p.h_tickets,
            group_m: p.group_m,
            depth: p.k,
            rank: p.r,
            alters: [Alters::of(&p.dropout, false).of_x(), Alters::Nothing],
        },
        Params::Sm90Backward(p) => Tickets {
            groups: p.m_groups,
            columns: p.k_blocks,
            units: p.dh_units,
            tickets: p.dh_tickets,
            group_m: p.group_m,
            depth: p.projections[0].n,
            rank: p.r,
            alters: {
                let altered = Alters::of(&p.dropout, p.projections[0].gain != 0);
                [altered.of_dy(), altered]
            },
        },
        other => panic!("{other:?}"),
    };
    let machine = Machine::new(&plan.device, choice.cluster, plan.launch.grid[0] / choice.cluster);
    let (depth, rank) = (tickets.depth as usize, tickets.rank as usize);
    let main = machine.main(&choice.tile, depth, rank).altered(tickets.alters[1], &choice.tile, depth, rank);
    (tickets, choice.tile, machine, main)
}

/// Every ticket in turn to the cluster that is free first, as the kernels do it: the clocks that main tiles wait for h in
/// all, and the time when the last of them is done.
fn simulate(plan: &Plan) -> (f64, f64) {
    let (t, _, machine, main) = tickets(plan);
    let unit = machine.narrow(t.depth as usize, t.rank as usize, u64::from(t.tickets), t.alters[0]);
    let mut free = vec![0.0_f64; machine.clusters as usize];
    // The cluster that is free first, which is then busy for as long as `clocks` says of its start.
    let mut draw = |clocks: &dyn Fn(f64) -> f64| {
        let first = (0..free.len()).min_by(|&a, &b| free[a].total_cmp(&free[b])).unwrap_or(0);
        let start = free[first];
        free[first] += clocks(start);
        (start, free[first])
    };
    let mut ready = vec![0.0_f64; t.groups as usize];
    for ticket in 0..t.tickets {
        let units = (ticket..t.units).step_by(t.tickets as usize);
        let (start, _) = draw(&|_| unit * units.len() as f64);
        for (done, index) in units.enumerate() {
            let group = &mut ready[(index % t.groups) as usize];
            *group = group.max(start + unit * (done + 1) as f64);
        }
    }
    let (mut waited, mut end) = (0.0, 0.0_f64);
    for index in 0..t.groups * t.columns {
        // `grouped` of kernels/blocks.cuh.
        let pass = index / (t.group_m * t.columns);
        let rows = (t.groups - pass * t.group_m).min(t.group_m);
        let group = pass * t.group_m + index % (t.group_m * t.columns) % rows;
        let wait = |start: f64| (ready[group as usize] - start - main.until_tail).max(0.0);
        let (start, done) = draw(&|start| main.clocks + wait(start));
        waited += wait(start);
        end = end.max(done);
    }
    (waited, end)
}

#[test]
fn no_main_tile_waits_for_h_or_dh() {
    for device in ["h100", "h200"].map(|name| Device::named(name).expect("it is in the table")) {
        for (n, k) in LAYERS {
            for r in [16, 64, 128] {
                let shape = LoraShape { m: 8192, n, k, r };
                for variant in [raw::Variant::default(), dropping(), gaining(n)] {
                    let forward = raw::Forward { variant, ..forward(shape) };
                    let backward = raw::Backward { variant, ..backward(shape) };
                    for plan in [Plan::forward(&forward, &device), Plan::backward(&backward, &device)] {
                        let plan = plan.expect("a plan");
                        let (waited, end) = simulate(&plan);
                        // A unit of h under dropout may take as long as a main tile; then a few tiles wait for a little.
                        let most =
                            if variant == dropping() { 0.01 * end * f64::from(plan.launch.grid[0]) } else { 0.0 };
                        assert!(waited <= most, "{waited} {end}\n{}", plan.explain());
                    }
                }
            }
        }
    }
}

/// The time by which forward was chosen is that of the simulation, or more where main tiles wait: then the longest wait is
/// taken to be everybody's.
#[test]
fn predictions_are_those_of_a_simulation() {
    for (m, n, k, r) in [(8192, 4096, 4096, 16), (4096, 14336, 4096, 64), (1000, 4096, 1024, 256), (130, 64, 64, 8)] {
        let device = Device::named("h200").expect("it is in the table");
        let shape = LoraShape { m, n, k, r };
        let options = crate::plan::Options::default().with_family(crate::plan::Family::Sm90);
        for variant in [raw::Variant::default(), dropping(), gaining(n)] {
            let op = raw::Forward { variant, ..forward(shape) };
            let plan = Plan::forward_with(&op, &device, options).expect("a plan");
            let (waited, end) = simulate(&plan);
            let simulated = super::model::microseconds(end);
            let predicted = plan.predicted_microseconds().expect("the family predicts");
            let most = if waited > 0.0 { 1.1 } else { 1.0 + 1e-9 };
            let ratio = predicted / simulated;
            assert!((1.0 - 1e-9..most).contains(&ratio), "{predicted} {simulated} {waited}\n{}", plan.explain());
        }
    }
}

/// Free slots in the last wave take h along: it costs no more than its tail.
#[test]
fn h_costs_nothing_beside_its_tail_where_a_wave_has_room() {
    let device = Device::named("h200").expect("it is in the table");
    let time = |r| {
        let shape = LoraShape { m: 8192, n: 4096, k: 4096, r };
        Plan::forward(&forward(shape), &device).expect("a plan").predicted_microseconds().expect("it predicts")
    };
    for (r, most) in [(16, 0.005), (64, 0.02), (128, 0.045)] {
        let tax = time(r) / time(0) - 1.0;
        assert!((0.0..most).contains(&tax), "rank {r}: {tax}");
    }
}

/// By the model dropout costs a few hundredths, more in backward, and `explain` says what it takes the parts to cost.
#[test]
fn dropout_costs_a_little() {
    let device = Device::named("h200").expect("it is in the table");
    for r in [16, 64, 128] {
        let shape = LoraShape { m: 8192, n: 4096, k: 4096, r };
        let plans = |variant| {
            [
                Plan::forward(&raw::Forward { variant, ..forward(shape) }, &device).expect("a plan"),
                Plan::backward(&raw::Backward { variant, ..backward(shape) }, &device).expect("a plan"),
            ]
        };
        let pairs = plans(raw::Variant::default()).into_iter().zip(plans(dropping()));
        for ((without, with), unit) in pairs.zip(["h", "da"]) {
            let time = |plan: &Plan| plan.predicted_microseconds().expect("the family predicts");
            let tax = time(&with) / time(&without) - 1.0;
            println!("rank {r}, {unit}: {tax:.4}");
            assert!((0.0..0.06).contains(&tax), "rank {r}: {tax}\n{}", with.explain());
            let says = format!("reckoned, not measured: 600 clocks a step of {unit}");
            assert!(with.explain().contains(&says) && !without.explain().contains("dropout"), "{}", with.explain());
        }
    }
}

/// By the model a gain costs nothing where products take longer than shared memory, and its gradient of the magnitude no more than
/// reading y; `explain` says what it takes a gain to cost.
#[test]
fn a_gain_costs_a_little() {
    let device = Device::named("h200").expect("it is in the table");
    for r in [16, 64, 128] {
        let shape = LoraShape { m: 8192, n: 4096, k: 4096, r };
        let time = |op: &raw::Backward| {
            let plan = Plan::backward(op, &device).expect("a plan");
            (plan.predicted_microseconds().expect("the family predicts"), plan.explain())
        };
        let plain = backward(shape);
        let gained = raw::Backward { variant: gaining(shape.n), ..plain };
        let dm = raw::MagnitudeGradient {
            y: at(12, shape.m, shape.n),
            bias: None,
            magnitude: at(13, 1, shape.n),
            dm: at(14, 1, shape.n),
        };
        let times = [plain, gained, raw::Backward { dm: Some(dm), ..gained }].map(|op| time(&op));
        let tax = |at: usize| times[at].0 / times[0].0 - 1.0;
        println!("rank {r}: {:.4} with a gain, {:.4} with dm", tax(1), tax(2));
        assert!((0.0..0.03).contains(&tax(1)) && (tax(1)..0.1).contains(&tax(2)), "{times:?}");
        let says = "reckoned, not measured: 256 clocks of shared memory a step that reads dy by rows";
        assert!(times[1].1.contains(says) && !times[0].1.contains("gain"), "{}", times[1].1);
    }
}

#[test]
fn shared_memory_suffices_for_every_tile() {
    let device = Device::of_arch("a device", 90, 132);
    for tile in TILES {
        assert!(tile.shared_bytes() <= device.shared_per_block, "{tile:?}");
    }
}

/// Far more plans than a training step has layers, in less than a blink: planning is on the path of every launch.
#[test]
fn planning_is_quick() {
    let device = Device::named("h200").expect("it is in the table");
    let start = std::time::Instant::now();
    let rounds = 20;
    let layers = LAYERS.map(|(n, k)| LoraShape { m: 8192, n, k, r: 16 });
    // Nor do shapes with a great many tickets, or with few for a great many tokens, take longer.
    let extremes = [(1_000_000, 64, 64, 16), (1 << 30, 8, 8, 8), (2_147_483_647, 1024, 64, 256), (16, 1 << 30, 64, 64)]
        .map(|(m, n, k, r)| LoraShape { m, n, k, r });
    let shapes = [&layers[..], &extremes].concat();
    for _ in 0..rounds {
        for &shape in &shapes {
            Plan::forward(&forward(shape), &device).expect("a plan");
            Plan::backward(&backward(shape), &device).expect("a plan");
        }
    }
    let each = start.elapsed() / (2 * rounds * shapes.len() as u32);
    assert!(each.as_micros() < 2000, "{each:?} per plan");
}
