//! What a problem is of: type, shape, device and options.

use arbitrary::{Result, Unstructured};
use fused_lora::plan::{Device, Family, Options, Peak, TileSize};
use fused_lora::{Dtype, LoraShape, MAX_DIMENSION};

pub(super) fn dtype(u: &mut Unstructured<'_>) -> Result<Dtype> {
    Ok(if u.ratio(1, 20)? { Dtype::F32 } else { *u.choose(&[Dtype::F16, Dtype::Bf16])? })
}

pub(super) fn dimension(u: &mut Unstructured<'_>) -> Result<usize> {
    Ok(match u.int_in_range(0..=63)? {
        0 => *u.choose(&[0, MAX_DIMENSION, MAX_DIMENSION + 1, 1 << 61, usize::MAX])?,
        1 | 2 => u.int_in_range(1..=MAX_DIMENSION)?,
        3 | 4 => 8 * u.int_in_range(1..=MAX_DIMENSION / 8)?,
        5..=12 => u.int_in_range(1..=20_000)?,
        13..=20 => 64 * u.int_in_range(1..=64)? + u.int_in_range(0..=2)? - 1,
        21..=28 => u.int_in_range(1..=70)?,
        29..=44 => 8 * u.int_in_range(1..=40)?,
        _ => 8 * u.int_in_range(1..=2500)?,
    })
}

pub(super) fn shape(u: &mut Unstructured<'_>) -> Result<LoraShape> {
    let (m, n, k) = (dimension(u)?, dimension(u)?, dimension(u)?);
    let r = match u.int_in_range(0..=15)? {
        0 | 1 => 0,
        2 => dimension(u)?,
        3..=6 => u.int_in_range(1..=300)?,
        _ => 8 * u.int_in_range(1..=33)?,
    };
    // As tensor maps need them.
    let is_whole = u.ratio(3, 4)?;
    let round = |extent: usize| if is_whole { extent.checked_next_multiple_of(8).unwrap_or(extent) } else { extent };
    Ok(LoraShape { m, n: round(n), k: round(k), r: round(r) })
}

pub(super) fn scale(u: &mut Unstructured<'_>) -> Result<f32> {
    Ok(if u.ratio(1, 60)? { f32::from_bits(u.arbitrary()?) } else { 2.0 })
}

pub(super) fn device(u: &mut Unstructured<'_>) -> Result<Device> {
    let sms = u.int_in_range(1..=300)?;
    let arch = *u.choose(&[75, 80, 86, 89, 90, 90, 90, 90, 90, 100, 120])?;
    let mut device = Device::of_arch("a device", arch, sms);
    if u.ratio(1, 2)? {
        device.peak =
            Some(Peak { teraflops: u.int_in_range(0..=3000)?, gigabytes_per_second: u.int_in_range(0..=9000)? });
    }
    // The fields are public.
    if u.ratio(1, 12)? {
        match u.int_in_range(0..=4)? {
            0 => device.arch = u.arbitrary()?,
            1 => device.sms = u.arbitrary()?,
            2 => device.shared_per_block = u.arbitrary()?,
            3 => device.shared_per_sm = u.arbitrary()?,
            _ => device.peak = Some(Peak { teraflops: u.arbitrary()?, gigabytes_per_second: u.arbitrary()? }),
        }
    }
    Ok(device)
}

pub(super) fn options(u: &mut Unstructured<'_>) -> Result<Options> {
    let mut options = Options::default();
    if u.ratio(1, 2)? {
        return Ok(options);
    }
    options.without_sm90 = u.ratio(1, 10)?;
    options.family = *u.choose(&[None, Some(Family::Portable), Some(Family::Sm90)])?;
    if u.ratio(1, 3)? {
        let tiles = [TileSize::Large, TileSize::Small, TileSize::Sm90N256, TileSize::Sm90N192, TileSize::Sm90N128];
        options.tile = Some(*u.choose(&tiles)?);
    }
    for (option, usual) in
        [(&mut options.cluster, 2), (&mut options.bundle, 70), (&mut options.chunks, 40), (&mut options.group_m, 20)]
    {
        *option = match u.int_in_range(0..=15)? {
            0 => Some(u.arbitrary()?),
            1..=4 => Some(u.int_in_range(1..=usual)?),
            _ => None,
        };
    }
    Ok(options)
}
