//! The properties of a GPU that planning looks at.

/// `(key, name, compute capability, SMs, TFLOP/s, GB/s)` of GPUs to plan for without one. SMs are the CUDA cores of NVIDIA's
/// data sheet or architecture white paper over the cores of an SM (64 in sm_75 and sm_80, 128 in the others); for the B200,
/// whose data sheet gives no cores, they are what the driver reports. SXM modules where a name is also sold as a PCIe card.
/// Rates as published there: 16-bit tensor products added in f32, without sparsity, at boost clock, which GeForce cards do at half
/// the rate of products added in f16. Those of T4, A100, L40S, RTX 4090, RTX 5090, H100, H200 and B200 were compared with what others
/// quote from these publications; those of RTX 2080 Ti and RTX PRO 6000 are also SMs × products per clock × clock, and width of the
/// bus × rate of a pin, as are the T4's 320 GB/s.
#[rustfmt::skip]
const NAMED: &[(&str, &str, u32, u32, u32, u32)] = &[
    ("t4",         "NVIDIA T4",                    75,  40,   65,  320), // 2560 cores
    ("rtx2080ti",  "NVIDIA GeForce RTX 2080 Ti",   75,  68,   53,  616), // 4352
    ("a100",       "NVIDIA A100",                  80, 108,  312, 2039), // 6912; the 80 GB module
    ("a10",        "NVIDIA A10",                   86,  72,  125,  600), // 9216
    ("a40",        "NVIDIA A40",                   86,  84,  149,  696), // 10752
    ("rtx3090",    "NVIDIA GeForce RTX 3090",      86,  82,   71,  936), // 10496
    ("l4",         "NVIDIA L4",                    89,  58,  121,  300), // 7424
    ("l40s",       "NVIDIA L40S",                  89, 142,  362,  864), // 18176
    ("rtx4090",    "NVIDIA GeForce RTX 4090",      89, 128,  165, 1008), // 16384
    ("h100",       "NVIDIA H100 SXM",              90, 132,  989, 3350), // 16896
    ("h200",       "NVIDIA H200",                  90, 132,  989, 4800), // 16896
    ("b200",       "NVIDIA B200",                 100, 148, 2250, 8000),
    ("rtx5090",    "NVIDIA GeForce RTX 5090",     120, 170,  209, 1792), // 21760
    ("rtxpro6000", "NVIDIA RTX PRO 6000 Blackwell", 120, 188, 503, 1792), // 24064
];

/// What drivers call some of these, where it is not the name above.
const ALIASES: &[(&str, &str)] =
    &[("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("Tesla T4", "t4")];

/// What a data sheet promises: the two rates that bound how fast an operation can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peak {
    /// 10^12 floating-point operations per second: 16-bit tensor products added in f32, without sparsity.
    pub teraflops: u32,
    /// 10^9 bytes per second from memory.
    pub gigabytes_per_second: u32,
}

impl Peak {
    /// The published rates of the GPU that a driver calls `name`; `None` when they are not known here.
    pub fn of(name: &str) -> Option<Peak> {
        let key = ALIASES.iter().find(|alias| alias.0 == name).map(|alias| alias.1);
        let row = NAMED.iter().find(|row| Some(row.0) == key || row.1 == name)?;
        Some(Peak { teraflops: row.4, gigabytes_per_second: row.5 })
    }
}

/// A GPU as the planner sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// For messages.
    pub name: String,
    /// Compute capability as major · 10 + minor.
    pub arch: u32,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Shared memory a CTA can opt in to, in bytes.
    pub shared_per_block: u32,
    /// Shared memory of an SM, in bytes.
    pub shared_per_sm: u32,
    /// What the data sheet promises, where it is known: for the model and for [`explain`](super::Plan::explain) alone. With a rate
    /// of 0 nothing is known.
    pub peak: Option<Peak>,
}

impl Device {
    /// A device of the given compute capability with that architecture's shared memory (CUDA C++ Programming Guide,
    /// "Technical Specifications per Compute Capability"), for planning without a GPU.
    pub fn of_arch(name: &str, arch: u32, sms: u32) -> Device {
        let (shared_per_sm, shared_per_block) = match arch {
            75 => (64, 64),
            80 | 87 => (164, 163),
            90 | 100 | 103 | 110 => (228, 227),
            _ => (100, 99),
        };
        Device {
            name: name.to_owned(),
            arch,
            sms,
            shared_per_block: shared_per_block << 10,
            shared_per_sm: shared_per_sm << 10,
            peak: Peak::of(name),
        }
    }

    /// The peak to reckon with: at a rate of 0 nothing would ever be done.
    pub(super) fn known_peak(&self) -> Option<Peak> {
        self.peak.filter(|peak| peak.teraflops != 0 && peak.gigabytes_per_second != 0)
    }

    /// A well-known GPU, for planning without it: [`names`](Self::names) lists what is known. Case, spaces and hyphens
    /// do not matter.
    ///
    /// ```
    /// use fused_lora::plan::Device;
    ///
    /// let h200 = Device::named("H200").expect("it is in the table");
    /// assert_eq!((h200.arch, h200.sms), (90, 132));
    /// assert_eq!(Device::named("RTX 4090"), Device::named("rtx4090"));
    /// assert_eq!(Device::named("voodoo2"), None);
    /// ```
    pub fn named(name: &str) -> Option<Device> {
        let key: String = name.chars().filter(|c| !matches!(c, ' ' | '-')).flat_map(char::to_lowercase).collect();
        let &(_, name, arch, sms, ..) = NAMED.iter().find(|row| row.0 == key)?;
        Some(Self::of_arch(name, arch, sms))
    }

    /// The names that [`named`](Self::named) knows.
    pub fn names() -> impl Iterator<Item = &'static str> {
        NAMED.iter().map(|row| row.0)
    }
}

#[cfg(test)]
mod tests {
    use super::{Device, Peak};
    use crate::plan::Plan;
    use crate::raw::{Forward, Matrix};
    use crate::{Dtype, Error};

    fn forward() -> Forward {
        let at = |index: u64, rows, cols| Matrix::new(index << 32, rows, cols);
        Forward {
            dtype: Dtype::Bf16,
            x: at(1, 8192, 4096),
            w: at(2, 4096, 4096),
            f32_factors: false,
            a: at(3, 16, 4096),
            b: at(4, 4096, 16),
            scale: 2.0,
            bias: None,
            h: None,
            y: at(5, 8192, 4096),
            variant: crate::raw::Variant::default(),
        }
    }

    #[test]
    fn every_named_device_is_planned_for_within_its_means() {
        assert!(Device::names().count() >= 10);
        for name in Device::names() {
            let device = Device::named(name).unwrap();
            let plan = Plan::forward(&forward(), &device).unwrap();
            let launch = plan.launch(256, plan.workspace_bytes()).unwrap();
            assert!(launch.shared_bytes <= device.shared_per_block, "{name}");
            let ctas_per_sm = launch.grid[0].div_ceil(device.sms);
            assert!(ctas_per_sm * launch.shared_bytes <= device.shared_per_sm, "{name}");
            assert!(plan.explain().contains(&device.name), "{name}");
        }
    }

    #[test]
    fn rates_are_found_by_the_name_that_the_driver_gives() {
        let h200 = Peak { teraflops: 989, gigabytes_per_second: 4800 };
        assert_eq!(Device::named("h200").unwrap().peak, Some(h200));
        assert_eq!(Peak::of("NVIDIA H200"), Some(h200));
        assert_eq!(Peak::of("NVIDIA H100 80GB HBM3"), Device::named("h100").unwrap().peak);
        assert_eq!((Peak::of("NVIDIA TITAN V"), Peak::of("")), (None, None));
        for &(key, .., teraflops, gigabytes) in super::NAMED {
            // Operations per byte: a slip of the pen leaves the range.
            assert!((50..1000).contains(&(1000 * teraflops / gigabytes)), "{key}");
        }
        for (_, key) in super::ALIASES {
            assert!(Device::named(key).is_some(), "{key}");
        }
    }

    /// Planning took seconds where a rate of 0 made every unit last forever.
    #[test]
    fn a_rate_of_0_is_not_known() {
        for peak in [(0, 4800), (989, 0)] {
            let peak = Some(Peak { teraflops: peak.0, gigabytes_per_second: peak.1 });
            for device in ["h200", "a100"].map(|name| Device::named(name).unwrap()) {
                let of = |peak| Plan::forward(&forward(), &Device { peak, ..device.clone() }).unwrap();
                let (plan, unknown) = (of(peak), of(None));
                assert_eq!(plan.predicted_microseconds(), unknown.predicted_microseconds());
                assert_eq!((plan.launch, plan.floor), (unknown.launch, unknown.floor));
            }
        }
    }

    #[test]
    fn names_are_unique_and_written_as_they_are_looked_up() {
        let mut names: Vec<&str> = Device::names().collect();
        assert!(names.iter().all(|name| name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Device::names().count());
    }

    #[test]
    fn architectures_before_turing_are_refused() {
        let volta = Device::of_arch("V100", 70, 80);
        let refused = Plan::forward(&forward(), &volta);
        assert_eq!(refused, Err(Error::UnsupportedArch { got: 70, built: "sm_75 and later".to_owned() }));
    }
}
