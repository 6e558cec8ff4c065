//! The compiled kernels this build carries.

/// One compiled `.cu` file.
#[derive(Debug)]
pub struct Image {
    /// `<family>_<file>`, as launches name it.
    pub name: &'static str,
    /// The fatbin: SASS for [`sass`](Self::sass), PTX for [`ptx_archs`](Self::ptx_archs).
    pub fatbin: &'static [u8],
    /// Plain PTX by virtual architecture (75 and 80, or 90), with line information: what the emulator runs. Empty without
    /// the feature `emulator`.
    pub ptx: &'static [(u32, &'static str)],
    /// Compute capabilities (major · 10 + minor) with machine code in the fatbin.
    pub sass: &'static [u32],
    /// Compute capabilities with PTX in the fatbin, which the driver compiles for any later GPU.
    pub ptx_archs: &'static [u32],
    /// The kernels use what one compute capability has and later ones do not (`sm_90a`): machine code and PTX run on exactly
    /// that one.
    pub is_specific: bool,
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
    /// major version and no higher minor version, or older PTX. A specific image runs on its own capability alone.
    pub fn supports(&self, arch: u32) -> bool {
        if self.is_specific {
            return self.sass.contains(&arch);
        }
        self.sass.iter().any(|&sass| sass / 10 == arch / 10 && sass <= arch)
            || self.ptx_archs.iter().any(|&ptx| ptx <= arch)
    }

    /// The newest PTX that a device of compute capability `arch` can run, with its virtual architecture: the emulator's.
    pub fn ptx_for(&self, arch: u32) -> Option<(u32, &'static str)> {
        let runs = |&&(built, _): &&(u32, &str)| if self.is_specific { built == arch } else { built <= arch };
        self.ptx.iter().filter(runs).max_by_key(|ptx| ptx.0).copied()
    }

    /// The architectures in words, for messages: `sm_80, sm_90, compute_80 and later`.
    pub fn architectures(&self) -> String {
        let mut words: Vec<String> =
            self.sass.iter().map(|arch| format!("sm_{arch}{}", if self.is_specific { "a" } else { "" })).collect();
        words.extend(self.ptx_archs.iter().map(|arch| format!("compute_{arch} and later")));
        words.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::Image;

    #[test]
    fn machine_code_runs_on_higher_minor_versions_and_ptx_on_anything_later() {
        let image = Image { name: "t", fatbin: &[], ptx: &[], sass: &[75, 80, 90], ptx_archs: &[], is_specific: false };
        assert!(image.supports(75) && image.supports(86) && image.supports(90));
        assert!(!image.supports(70) && !image.supports(100));
        let with_ptx = Image { ptx_archs: &[80], ..image };
        assert!(with_ptx.supports(100) && !with_ptx.supports(72));
    }

    #[test]
    fn a_specific_image_runs_on_its_own_capability_alone() {
        let image = Image { name: "t", fatbin: &[], ptx: &[(90, "")], sass: &[90], ptx_archs: &[], is_specific: true };
        assert!(image.supports(90) && !image.supports(80) && !image.supports(100));
        assert!(image.ptx_for(90).is_some() && image.ptx_for(80).is_none() && image.ptx_for(100).is_none());
        assert_eq!(image.architectures(), "sm_90a");
        let generic = Image { is_specific: false, ptx: &[(75, ""), (80, "")], ..image };
        assert_eq!(generic.ptx_for(79).map(|ptx| ptx.0), Some(75));
        assert_eq!(generic.ptx_for(120).map(|ptx| ptx.0), Some(80));
    }
}
