//! The compiled kernels this build carries.

/// One compiled `.cu` file.
#[derive(Debug)]
pub struct Image {
    /// `<family>_<file>`, as launches name it.
    pub name: &'static str,
    /// The fatbin: SASS for [`sass`](Self::sass), PTX for [`ptx_archs`](Self::ptx_archs).
    pub fatbin: &'static [u8],
    /// Plain PTX by virtual architecture (75, 80), with line information: what the emulator runs. Empty without the
    /// feature `emulator`.
    pub ptx: &'static [(u32, &'static str)],
    /// Compute capabilities (major · 10 + minor) with machine code in the fatbin.
    pub sass: &'static [u32],
    /// Compute capabilities with PTX in the fatbin, which the driver compiles for any later GPU.
    pub ptx_archs: &'static [u32],
}

#[cfg(all(feature = "cuda", not(fused_lora_no_kernels)))]
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Every image of this build; empty without the `cuda` feature.
#[cfg(not(all(feature = "cuda", not(fused_lora_no_kernels))))]
pub static IMAGES: &[Image] = &[];

impl Image {
    /// The image a launch names.
    pub fn find(name: &str) -> Option<&'static Image> {
        IMAGES.iter().find(|image| image.name == name)
    }

    /// Whether a GPU of compute capability `arch` (major · 10 + minor) can run this image: machine code of the same
    /// major version and no higher minor version, or older PTX.
    pub fn supports(&self, arch: u32) -> bool {
        self.sass.iter().any(|&sass| sass / 10 == arch / 10 && sass <= arch)
            || self.ptx_archs.iter().any(|&ptx| ptx <= arch)
    }

    /// The architectures in words, for messages: `sm_80, sm_90, compute_80 and later`.
    pub fn architectures(&self) -> String {
        let mut words: Vec<String> = self.sass.iter().map(|arch| format!("sm_{arch}")).collect();
        words.extend(self.ptx_archs.iter().map(|arch| format!("compute_{arch} and later")));
        words.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::Image;

    #[test]
    fn machine_code_runs_on_higher_minor_versions_and_ptx_on_anything_later() {
        let image = Image { name: "t", fatbin: &[], ptx: &[], sass: &[75, 80, 90], ptx_archs: &[] };
        assert!(image.supports(75) && image.supports(86) && image.supports(90));
        assert!(!image.supports(70) && !image.supports(100));
        let with_ptx = Image { ptx_archs: &[80], ..image };
        assert!(with_ptx.supports(100) && !with_ptx.supports(72));
    }
}
