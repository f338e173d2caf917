use num_bigint::{BigInt, BigUint};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Values of all kinds: of any bits, round ones, huge, tiny and opposite ones.
fn any_value() -> impl Strategy<Value = Option<f64>> {
    prop_oneof![
        1 => Just(None),
        6 => any::<u64>().prop_map(|bits| Some(f64::from_bits(bits))),
        6 => (-1e6..1e6).prop_map(Some),
        3 => (-1000_i32..1000).prop_map(|whole| Some(f64::from(whole))),
        3 => prop_oneof![
            Just(f64::MAX), Just(f64::MIN), Just(f64::MIN_POSITIVE), Just(5e-324), Just(-5e-324), Just(0.0), Just(-0.0),
            Just(1e308), Just(-1e308), Just(f64::EPSILON),
        ].prop_map(Some),
    ]
}

fn finite() -> impl Strategy<Value = Vec<f64>> {
    vec(any_value(), 1..40)
        .prop_map(|values| values.into_iter().flatten().filter(|value| value.is_finite()).collect())
}

fn of(values: impl IntoIterator<Item = Option<f64>>) -> Moments {
    let mut moments = Moments::default();
    for value in values {
        moments.add(value);
    }
    moments
}

/// A finite double as a whole number of units.
fn exact(value: f64) -> BigInt {
    let bits = value.to_bits();
    let (exponent, fraction) = ((bits >> 52) & 0x7ff, bits & ((1 << 52) - 1));
    let magnitude = match exponent {
        0 => BigInt::from(fraction),
        _ => BigInt::from(fraction | (1 << 52)) << (exponent - 1),
    };
    if value < 0.0 { -magnitude } else { magnitude }
}

/// Whether no double is nearer to `numerator / denominator` units than this one.
fn is_nearest(value: f64, numerator: &BigInt, denominator: u64) -> bool {
    if value.is_infinite() {
        // Half a step beyond the largest one.
        let limit = (exact(f64::MAX) << 1_u32) + (BigInt::from(1) << 971_u32 << 1074_u32);
        return numerator.magnitude() << 1_u32 >= limit.magnitude() * denominator;
    }
    let distance = |other: f64| (exact(other) * BigInt::from(denominator) - numerator).magnitude().clone();
    let near = distance(value);
    [value.next_up(), value.next_down()].into_iter().filter(|other| other.is_finite()).all(|other| {
        let far = distance(other);
        // Of two that are as near the even one.
        near < far || (near == far && value.to_bits() & 1 == 0)
    })
}

proptest! {
    #[test]
    fn neither_order_nor_parts_change_a_bit(values in vec(any_value(), 0..60), cuts in vec(any::<prop::sample::Index>(), 0..5), seed in any::<u64>()) {
        let expected = of(values.clone()).write();
        let mut shuffled = values.clone();
        let mut state = seed;
        for place in (1..shuffled.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            shuffled.swap(place, usize::try_from(state >> 33).unwrap() % (place + 1));
        }
        prop_assert_eq!(&of(shuffled.clone()).write(), &expected);
        let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(shuffled.len() + 1)).collect();
        places.extend([0, shuffled.len()]);
        places.sort_unstable();
        let mut whole = Moments::default();
        for pair in places.windows(2) {
            let part = of(shuffled[pair[0]..pair[1]].to_vec()).write();
            whole.merge(&Moments::read(&part).unwrap());
        }
        prop_assert_eq!(whole.write(), expected);
    }

    #[test]
    fn sums_and_means_are_the_nearest_doubles(values in finite()) {
        let sum: BigInt = values.iter().map(|value| exact(*value)).sum();
        let found = of(values.iter().copied().map(Some)).summary();
        prop_assert!(is_nearest(found.sum, &sum, 1), "{} of {values:?}", found.sum);
        if !values.is_empty() {
            prop_assert!(is_nearest(found.mean, &sum, values.len() as u64), "{} of {values:?}", found.mean);
        }
    }

    #[test]
    fn a_standard_deviation_is_the_nearest_double_to_the_root(values in finite()) {
        prop_assume!(values.len() > 1);
        let count = BigInt::from(values.len());
        let sum: BigInt = values.iter().map(|value| exact(*value)).sum();
        let squares: BigInt = values.iter().map(|value| exact(*value).pow(2)).sum();
        // In squared units, of n (n - 1).
        let spread = (&count * squares - &sum * &sum).magnitude().clone();
        let share = (&count * (&count - BigInt::from(1))).magnitude().clone();
        let found = of(values.iter().copied().map(Some)).summary().stddev;
        if found.is_finite() {
            // The root lies between the middles to both neighbours: squared, and doubled, to stay whole.
            let middle = |other: f64| (exact(found) + exact(other)).magnitude().pow(2);
            let spread: BigUint = spread << 2_u32;
            if found > 0.0 {
                prop_assert!(middle(found.next_down()) * &share <= spread, "{found} of {values:?}");
            }
            prop_assert!(spread <= middle(found.next_up()) * &share, "{found} of {values:?}");
        }
    }

    #[test]
    fn bytes_that_are_none_are_refused(bytes in vec(any::<u8>(), 0..200)) {
        if let Some(mut moments) = Moments::read(&bytes) {
            // What can be read can be used.
            let _ = (moments.summary(), moments.write());
        }
    }
}

#[test]
fn what_is_no_number_counts_as_it_is_said() {
    let summary = |values: &[f64]| of(values.iter().copied().map(Some)).summary();
    let found = summary(&[1.0, f64::NAN]);
    assert!(found.mean.is_nan() && found.stddev.is_nan() && (found.count, found.nans) == (2, 1));
    assert_eq!((found.min, found.max), (1.0, 1.0));
    let found = summary(&[1.0, f64::INFINITY]);
    assert!(found.mean == f64::INFINITY && found.stddev.is_nan() && found.max == f64::INFINITY);
    assert!(summary(&[f64::NEG_INFINITY, f64::INFINITY]).mean.is_nan());
    assert_eq!((summary(&[f64::INFINITY]).stddev, summary(&[f64::NAN]).stddev), (0.0, 0.0));
    // Twice the largest double is none, but half of that is.
    let found = summary(&[f64::MAX, f64::MAX]);
    assert_eq!((found.sum, found.mean, found.stddev), (f64::INFINITY, f64::MAX, 0.0));
    let found = summary(&[f64::MAX, f64::MAX, f64::MIN, 1.0, f64::MIN]);
    assert_eq!((found.sum, found.mean), (1.0, 0.2));
    let found = summary(&[3.0]);
    assert_eq!((found.mean, found.stddev), (3.0, 0.0));
    let mut none = of([None, None]);
    let found = none.summary();
    assert!((found.count, found.nulls) == (0, 2) && found.mean.is_nan() && found.min.is_nan());
    assert_eq!(summary(&[-0.0, 0.0]).min.to_bits(), (-0.0_f64).to_bits());
}

#[test]
fn ordinary_values_have_the_usual_moments() {
    let found = of([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0].map(Some)).summary();
    assert_eq!((found.mean, found.sum, found.min, found.max), (5.0, 40.0, 2.0, 9.0));
    assert_eq!(found.stddev, (32.0_f64 / 7.0).sqrt());
    let tenths = of(std::iter::repeat_n(Some(0.1), 10)).summary();
    // Added up one after the other they are 0.9999999999999999.
    assert_eq!((tenths.sum, tenths.mean, tenths.stddev), (1.0, 0.1, 0.0));
}
