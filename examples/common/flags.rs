//! Flags that both programs take, and values that name their flag when they are wrong.

use std::ffi::OsString;
use std::path::PathBuf;

use candle_core::{DType, Device};
use lexopt::ValueExt;

use super::failure::{Failure, Result};

impl From<lexopt::Error> for Failure {
    fn from(error: lexopt::Error) -> Self {
        Self::Usage(error.to_string())
    }
}

/// The value of `--flag` as `read` understands it; `expected` says in words what that is.
pub fn value<T>(
    parser: &mut lexopt::Parser,
    flag: &str,
    expected: &str,
    read: impl Fn(&str) -> Option<T>,
) -> Result<T> {
    let text = parser.value()?.string()?;
    read(&text).ok_or_else(|| Failure::Usage(format!("`--{flag}` is `{text}`, expected {expected}")))
}

/// A whole number of at least `least`.
pub fn count(parser: &mut lexopt::Parser, flag: &str, least: usize) -> Result<usize> {
    value(parser, flag, &format!("a whole number of at least {least}"), |text| {
        text.parse().ok().filter(|&number| number >= least)
    })
}

pub fn seed(parser: &mut lexopt::Parser) -> Result<u64> {
    value(parser, "seed", "a whole number below 2^64", |text| text.parse().ok())
}

/// A finite number for which `accept` holds.
pub fn number(parser: &mut lexopt::Parser, flag: &str, expected: &str, accept: fn(f64) -> bool) -> Result<f64> {
    value(parser, flag, expected, |text| finite(text).filter(|&number| accept(number)))
}

pub fn finite(text: &str) -> Option<f64> {
    text.trim().parse().ok().filter(|number: &f64| number.is_finite())
}

pub fn path(parser: &mut lexopt::Parser) -> Result<PathBuf> {
    let path: OsString = parser.value()?;
    Ok(path.into())
}

pub fn missing(flag: &str) -> Failure {
    Failure::Usage(format!("`--{flag}` is missing; see --help"))
}

pub fn dtype(parser: &mut lexopt::Parser) -> Result<DType> {
    value(parser, "dtype", "f32, f16 or bf16", |text| match text {
        "f32" => Some(DType::F32),
        "f16" => Some(DType::F16),
        "bf16" => Some(DType::BF16),
        _ => None,
    })
}

/// Where to compute: as asked, or unasked a GPU if this build and this machine have one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    #[default]
    Any,
    Cpu,
    Cuda,
}

impl Place {
    pub fn read(parser: &mut lexopt::Parser) -> Result<Self> {
        value(parser, "device", "cpu or cuda", |text| match text {
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda),
            _ => None,
        })
    }

    pub fn device(self) -> Result<Device> {
        let built = candle_core::utils::cuda_is_available();
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda if !built => Err(Failure::Usage(
                "`--device` is `cuda`, expected cpu: this build lacks the feature `candle-cuda`".into(),
            )),
            Self::Cuda => {
                let unusable = |error| Failure::Usage(format!("`--device` is `cuda`, but no GPU can be used: {error}"));
                Device::new_cuda(0).map_err(unusable)
            }
            Self::Any if built => Ok(Device::new_cuda(0).unwrap_or(Device::Cpu)),
            Self::Any => Ok(Device::Cpu),
        }
    }
}
