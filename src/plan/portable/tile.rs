//! Tile shapes of the portable family and the choice between them.

use crate::Dtype;
use crate::error::{Error, Result};
use crate::params::*;
use crate::plan::calibration::PORTABLE;
use crate::plan::{Device, Launch, MAX_CTAS, TileSize, blocks};

/// A product that is computed tile by tile: rows, the columns of each projection, and depth.
pub(in crate::plan) struct Product {
    pub rows: usize,
    pub columns: Vec<usize>,
    pub depth: usize,
}

impl Product {
    fn tiles(&self, block: u32) -> u64 {
        let columns: u64 = self.columns.iter().map(|&columns| blocks(columns, block)).sum();
        blocks(self.rows, block).saturating_mul(columns)
    }
}

/// One of the tile shapes compiled into the portable family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::plan) struct Tile {
    /// Rows, and columns, of a main tile.
    pub block: u32,
    pub threads: u32,
    stages: u32,
    /// CTAs per SM that the registers allow: `kCtasPerSm` of the kernel.
    ctas_by_registers: u32,
    /// Work per SM and unit of time relative to the large tile.
    rate: f64,
}

const LARGE: Tile = Tile {
    block: LORA_LARGE_BLOCK,
    threads: LORA_LARGE_THREADS,
    stages: LORA_LARGE_STAGES,
    ctas_by_registers: 2,
    rate: 1.0,
};
const SMALL: Tile = Tile {
    block: LORA_SMALL_BLOCK,
    threads: LORA_SMALL_THREADS,
    stages: LORA_SMALL_STAGES,
    ctas_by_registers: 4,
    rate: PORTABLE.small_rate,
};

/// Static shared memory of a kernel and what the system reserves per CTA.
const SHARED_OVERHEAD: u32 = 1024 + 128;

impl Tile {
    /// Whether the tiles run on `device`. Real GPUs from sm_75 on pass: its fields are public, so others are possible.
    pub(in crate::plan) fn check(device: &Device) -> Result<()> {
        // The oldest architecture the kernels are written for (ldmatrix, fp16 m16n8k8).
        if device.arch < 75 {
            return Err(Error::UnsupportedArch { got: device.arch, built: "sm_75 and later".to_owned() });
        }
        if device.sms == 0 {
            return Err(Error::ZeroDimension { arg: "device", axis: "SMs" });
        }
        let limit = MAX_CTAS / SMALL.ctas_by_registers;
        if device.sms > limit {
            return Err(Error::TooLarge { what: "the number of SMs", got: device.sms.into(), limit: limit.into() });
        }
        let (needed, limit) = (LARGE.shared_bytes() + SHARED_OVERHEAD, device.shared_per_block);
        if needed > limit {
            return Err(Error::TooLarge {
                what: "the shared memory of a CTA",
                got: needed.into(),
                limit: limit.into(),
            });
        }
        Ok(())
    }

    pub(in crate::plan) fn is_large(&self) -> bool {
        *self == LARGE
    }

    pub(in crate::plan) fn shared_bytes(&self) -> u32 {
        2 * self.block * LORA_BLOCK_K * 2 * self.stages
    }

    pub(in crate::plan) fn ctas_per_sm(&self, device: &Device) -> u32 {
        let by_registers = if device.arch < 80 { self.ctas_by_registers / 2 } else { self.ctas_by_registers };
        (device.shared_per_sm / (self.shared_bytes() + SHARED_OVERHEAD)).clamp(1, by_registers)
    }

    /// Relative time of products: whole waves of tiles, each as long as its area and depth.
    fn time(&self, device: &Device, products: &[Product]) -> f64 {
        let slots = u64::from(device.sms * self.ctas_per_sm(device));
        let per_wave = f64::from(self.block) * f64::from(self.block) * f64::from(self.ctas_per_sm(device)) / self.rate;
        products
            .iter()
            .map(|product| product.tiles(self.block).div_ceil(slots) as f64 * per_wave * product.depth as f64)
            .sum()
    }

    /// Predicted time, to weigh the families where there are two; `None` where nothing is known that it could be reckoned from.
    pub(in crate::plan) fn microseconds(&self, device: &Device, dtype: Dtype, products: &[Product]) -> Option<f64> {
        let (sms, most) = (u64::from(device.sms), u64::from(self.ctas_per_sm(device)));
        let of_sm = match (device.arch, dtype) {
            (90, _) => PORTABLE.hopper_sm_flops_per_us,
            (75, Dtype::Bf16) => PORTABLE.turing_sm_f32_flops_per_us,
            // The data sheet's rate is that of tcgen05, and what mma.sync reaches beside it is not known.
            (100..=119, _) => return None,
            _ => PORTABLE.of_peak * f64::from(device.known_peak()?.teraflops) * 1e6 / sms as f64,
        };
        let flops_per_us = of_sm * self.rate;
        let time = |product: &Product| {
            // Of the SM with the most tiles: whole waves, and one that may not fill it.
            let per_sm = product.tiles(self.block).div_ceil(sms);
            let flops = 2.0 * f64::from(self.block) * f64::from(self.block) * product.depth as f64;
            let shared = per_sm.min(most) as f64 / most as f64;
            per_sm as f64 * flops / (flops_per_us * shared.max(PORTABLE.alone))
        };
        Some(PORTABLE.launch + products.iter().map(time).sum::<f64>())
    }

    /// The tile shape asked for, or the one with the shortest predicted time; the large one when they tie.
    pub(in crate::plan) fn choose(device: &Device, size: Option<TileSize>, products: &[Product]) -> Tile {
        match size {
            Some(TileSize::Large) => LARGE,
            Some(TileSize::Small) => SMALL,
            _ if SMALL.time(device, products) < LARGE.time(device, products) => SMALL,
            _ => LARGE,
        }
    }

    pub(in crate::plan) fn launch(
        &self,
        image: &'static str,
        kernel: &'static str,
        units: u32,
        device: &Device,
        params: Params,
    ) -> Launch {
        Launch {
            image,
            kernel,
            grid: [units.min(device.sms * self.ctas_per_sm(device)).max(1), 1, 1],
            cluster: [1, 1, 1],
            block: [self.threads, 1, 1],
            shared_bytes: self.shared_bytes(),
            maps: Vec::new(),
            params,
        }
    }
}
