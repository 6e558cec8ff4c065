//! What is launched, on which device, and how the emulator goes about it.

use crate::decode::SHARED_BASE;
use crate::module::{Kernel, Module};
use crate::report::{Report, Rule};

/// One kernel launch, as the driver takes it.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// Entry point.
    pub kernel: &'a str,
    /// CTAs.
    pub grid: [u32; 3],
    /// CTAs per cluster.
    pub cluster: [u32; 3],
    /// Threads per CTA.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
    /// The kernel's parameters, each at its natural alignment, in order.
    pub params: &'a [u8],
}

/// The limits of the simulated device: how many CTAs are alive at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Shared memory of an SM in bytes, the 1 KiB that the system takes per CTA included.
    pub shared_per_sm: u32,
    /// Shared memory a CTA can have, in bytes.
    pub shared_per_cta: u32,
    /// Resident threads per SM.
    pub threads_per_sm: u32,
    /// Resident CTAs per SM.
    pub ctas_per_sm: u32,
    /// 32-bit registers per SM.
    pub registers_per_sm: u32,
    /// CTAs a cluster can have: 8 on every device with clusters, up to 16 where the kernel may have a cluster size that is
    /// not portable.
    pub ctas_per_cluster: u32,
}

impl Device {
    /// A device of eight SMs with the shared memory of compute capability 9.0.
    pub fn hopper() -> Device {
        Device { sms: 8, shared_per_sm: 228 << 10, shared_per_cta: 227 << 10, ..Device::default() }
    }
}

impl Default for Device {
    /// A device of four SMs with the shared memory of compute capability 8.0.
    fn default() -> Self {
        Device {
            sms: 4,
            shared_per_sm: 164 << 10,
            shared_per_cta: 163 << 10,
            threads_per_sm: 2048,
            ctas_per_sm: 32,
            registers_per_sm: 65536,
            ctas_per_cluster: 8,
        }
    }
}

/// When an asynchronous copy or matrix operation takes place, between being issued and being waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Timing {
    /// At once.
    Eager,
    /// When it is waited for.
    Lazy,
    /// Each one or the other, at random.
    #[default]
    Mixed,
}

/// How to run a launch. The same options and memory give the same run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Decides every random choice: which warp runs, for how long, when copies land, in which order CTAs start.
    pub seed: u64,
    /// The device.
    pub device: Device,
    /// When asynchronous copies land and matrix operations take place.
    pub copies: Timing,
    /// What is looked for and counted beside what every run is checked for.
    pub checks: Checks,
    /// Demand a `fence.proxy.async` between generic reads and an asynchronous write of the same bytes, too, as the text of
    /// the ISA has it. Kernels in use hand a stage that they have read with `ld.shared` back to the copies with an mbarrier
    /// alone. Generic writes always need the fence.
    pub fence_reads: bool,
    /// Registers per thread, as ptxas reports them, when they should limit how many CTAs are resident. PTX does not say:
    /// without a number here, those that `.maxnreg` allows are taken, else none.
    pub registers: Option<u32>,
    /// Warp instructions without any effect on memory, barriers or other warps after which the run is a livelock.
    pub patience: u64,
    /// Warp instructions after which the run is given up, whatever they do.
    pub limit: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            seed: 1,
            device: Device::default(),
            copies: Timing::Mixed,
            checks: Checks::default(),
            fence_reads: false,
            registers: None,
            patience: 2_000_000,
            limit: u64::MAX,
        }
    }
}

/// Checks that cost time. Bounds, alignment, barriers and deadlocks are always checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checks {
    /// Data races.
    pub races: bool,
    /// Reads of what nothing has written.
    pub uninitialised: bool,
    /// Counts by instruction: [`Counters::lines`](crate::Counters::lines), bank conflicts, sectors.
    pub counters: bool,
}

impl Default for Checks {
    /// All but the counters.
    fn default() -> Self {
        Checks { races: true, uninitialised: true, counters: false }
    }
}

/// Registers are given to warps in units of this many.
const REGISTER_UNIT: u32 = 256;

fn product([x, y, z]: [u32; 3]) -> Option<u32> {
    x.checked_mul(y)?.checked_mul(z)
}

/// A launch that passed every check.
pub(crate) struct Checked<'a> {
    pub kernel: &'a Kernel,
    pub threads: u32,
    pub ctas: u32,
    /// Bytes of shared memory per CTA, from [`SHARED_BASE`] on.
    pub shared_bytes: u32,
    /// CTAs alive at once: whole clusters.
    pub resident: u32,
    pub cluster: [u32; 3],
}

/// Largest grid: four bytes are held for each CTA.
const MOST_CTAS: u32 = 1 << 26;

impl Launch<'_> {
    pub(crate) fn bad(&self, message: String) -> Box<Report> {
        let kernel = self.kernel.to_owned();
        Box::new(Report { rule: Rule::BadLaunch, kernel, message, site: None, other: None })
    }

    pub(crate) fn check<'m>(&self, module: &'m Module, options: &Options) -> Result<Checked<'m>, Box<Report>> {
        let device = &options.device;
        let bad = |message: String| Err(self.bad(message));
        let kernel = match module.kernel(self.kernel) {
            Some(Ok(kernel)) => kernel,
            Some(Err(errors)) => return bad(errors.first().map_or_else(String::new, ToString::to_string)),
            None => return bad(format!("no such kernel, expected one of {}", module.kernels().join(", "))),
        };
        if self.params.len() != kernel.param_bytes as usize {
            return bad(format!("{} bytes of parameters, expected {}", self.params.len(), kernel.param_bytes));
        }
        let cluster = match self.check_cluster(kernel, device) {
            Ok(cluster) => cluster,
            Err(message) => return bad(message),
        };
        let threads = product(self.block).unwrap_or(u32::MAX);
        let most = kernel.max_threads.unwrap_or(1024).min(1024).min(device.threads_per_sm);
        if threads == 0 || threads > most {
            return bad(format!("{threads} threads per CTA, expected 1 to {most}"));
        }
        let ctas = product(self.grid).unwrap_or(0);
        if ctas == 0 || ctas > MOST_CTAS {
            return bad(format!("a grid of {:?} CTAs, expected 1 to {MOST_CTAS}", self.grid));
        }
        let dynamic_start = kernel.shared_end.next_multiple_of(kernel.dynamic_align);
        let shared_bytes = (dynamic_start - SHARED_BASE).saturating_add(self.shared_bytes);
        if shared_bytes > device.shared_per_cta {
            return bad(format!("{shared_bytes} bytes of shared memory, expected at most {}", device.shared_per_cta));
        }
        let by_shared = device.shared_per_sm / (shared_bytes + SHARED_BASE);
        let by_threads = device.threads_per_sm / threads.next_multiple_of(32);
        let registers = options.registers.or(kernel.max_registers).unwrap_or(0);
        if registers > 255 {
            return bad(format!("{registers} registers per thread, expected at most 255"));
        }
        let by_registers = match registers {
            0 => u32::MAX,
            each => device.registers_per_sm / (threads.div_ceil(32) * (32 * each).next_multiple_of(REGISTER_UNIT)),
        };
        let per_sm = by_shared.min(by_threads).min(by_registers).min(device.ctas_per_sm);
        if per_sm == 0 || device.sms == 0 {
            return bad(format!("no SM of {device:?} can hold a CTA"));
        }
        let in_cluster = product(cluster).unwrap_or(u32::MAX);
        let resident = device.sms.saturating_mul(per_sm).min(ctas) / in_cluster * in_cluster;
        if resident == 0 {
            return bad(format!("{device:?} cannot hold a cluster of {in_cluster} CTAs at once"));
        }
        Ok(Checked { kernel, threads, ctas, shared_bytes, resident, cluster })
    }

    /// The cluster's dimensions, or what is wrong with them.
    fn check_cluster(&self, kernel: &Kernel, device: &Device) -> Result<[u32; 3], String> {
        let rule = &kernel.cluster;
        let cluster = match rule.required {
            // What the kernel requires need not be repeated by the launch.
            Some(required) if self.cluster == [1, 1, 1] => required,
            Some(required) if self.cluster != required => {
                return Err(format!("clusters of {:?} CTAs, the kernel requires {required:?}", self.cluster));
            }
            _ => self.cluster,
        };
        let most = rule.most.unwrap_or(16).min(device.ctas_per_cluster).min(16);
        match product(cluster) {
            Some(size) if size >= 1 && size <= most => {}
            _ => return Err(format!("clusters of {cluster:?} CTAs, expected 1 to {most} CTAs")),
        }
        if (0..3).any(|axis| !self.grid[axis].is_multiple_of(cluster[axis])) {
            return Err(format!("a grid of {:?} CTAs is not made of clusters of {cluster:?}", self.grid));
        }
        Ok(cluster)
    }
}
