//! Slices of elements to f32 and back, vectorised where the element type allows.

use std::any::TypeId;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::Element;

/// `slice` as elements of `U` when that is what they are.
pub(super) fn cast<T: Element, U: Element>(slice: &[T]) -> Option<&[U]> {
    // SAFETY: T and U are the same type, so layout, validity and lifetime are unchanged.
    (TypeId::of::<T>() == TypeId::of::<U>()).then(|| unsafe { &*(std::ptr::from_ref(slice) as *const [U]) })
}

/// As [`cast`], for a slice that is written.
fn cast_mut<T: Element, U: Element>(slice: &mut [T]) -> Option<&mut [U]> {
    // SAFETY: as in `cast`; the exclusive borrow passes to the result.
    (TypeId::of::<T>() == TypeId::of::<U>()).then(|| unsafe { &mut *(std::ptr::from_mut(slice) as *mut [U]) })
}

/// Widens every element; both slices have the same length.
pub(super) fn widen<T: Element>(source: &[T], target: &mut [f32]) {
    if let Some(source) = cast::<T, f32>(source) {
        target.copy_from_slice(source);
    } else if let Some(source) = cast::<T, f16>(source) {
        source.convert_to_f32_slice(target);
    } else if let Some(source) = cast::<T, bf16>(source) {
        // bf16 is the upper half of an f32; a plain shift also keeps NaNs NaN and vectorises best.
        for (target, source) in target.iter_mut().zip(source) {
            *target = f32::from_bits(u32::from(source.to_bits()) << 16);
        }
    }
}

/// Rounds every element to nearest, ties to even; both slices have the same length.
pub(super) fn narrow<T: Element>(source: &[f32], target: &mut [T]) {
    if let Some(target) = cast_mut::<T, f16>(target) {
        target.convert_from_f32_slice(source);
    } else {
        for (target, &source) in target.iter_mut().zip(source) {
            *target = T::from_f32(source);
        }
    }
}

/// The type a tile is summed in.
pub(super) trait Sum:
    Copy + Send + Sync + std::ops::AddAssign + std::ops::MulAssign + From<f32> + 'static
{
    /// The elements as they are, where they are of this type.
    fn borrow<T: Element>(_: &[T]) -> Option<&[Self]> {
        None
    }
    /// Widens every element; both slices have the same length.
    fn load<T: Element>(source: &[T], target: &mut [Self]);
    /// Rounds every sum once, to nearest, ties to even; both slices have the same length.
    fn store<O: Element>(source: &[Self], target: &mut [O]);
}

impl Sum for f32 {
    fn borrow<T: Element>(source: &[T]) -> Option<&[Self]> {
        cast(source)
    }
    fn load<T: Element>(source: &[T], target: &mut [Self]) {
        widen(source, target);
    }
    fn store<O: Element>(source: &[Self], target: &mut [O]) {
        narrow(source, target);
    }
}

impl Sum for f64 {
    fn load<T: Element>(source: &[T], target: &mut [Self]) {
        target.iter_mut().zip(source).for_each(|(target, source)| *target = source.to_f64());
    }
    fn store<O: Element>(source: &[Self], target: &mut [O]) {
        target.iter_mut().zip(source).for_each(|(target, &source)| *target = O::from_f64(source));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every 16-bit pattern, through the slice functions and through the element's own conversions.
    fn every_pattern<T: Element>(from_bits: fn(u16) -> T) {
        let all: Vec<T> = (0..=u16::MAX).map(from_bits).collect();
        let mut wide = vec![0.0; all.len()];
        widen(&all, &mut wide);
        let mut back = vec![T::default(); all.len()];
        narrow(&wide, &mut back);
        for ((element, wide), back) in all.iter().zip(&wide).zip(&back) {
            let expected = element.to_f32();
            assert!(wide.to_bits() == expected.to_bits() || (wide.is_nan() && expected.is_nan()), "{element:?}");
            assert!(back == element || (wide.is_nan() && back.to_f32().is_nan()), "{element:?}");
        }
    }

    #[test]
    fn sixteen_bits_survive_the_round_trip() {
        every_pattern(f16::from_bits);
        every_pattern(bf16::from_bits);
    }

    #[test]
    fn narrowing_rounds_ties_to_even() {
        let halfway = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::MAX];
        let mut narrowed = [bf16::ZERO; 3];
        narrow(&halfway, &mut narrowed);
        assert_eq!(narrowed.map(bf16::to_f32), [1.0, 1.0 + 4.0 / 256.0, f32::INFINITY]);
    }
}
