//! How far two samples are from each other, and from where on that is more than chance.
//!
//! With `p` the reference's share of a bin, `q` the current one, `N` and `M` what they are shares of, and `B` bins:
//!
//! | measure | formula |
//! | --- | --- |
//! | `psi` | `sum (p - q) ln(p / q)` (B. Yurdakul, "Statistical properties of population stability index", 2018) |
//! | `js` | `sqrt((KL(p, m) + KL(q, m)) / 2)` to base 2, with `m = (p + q) / 2` (J. Lin, 1991; `scipy.spatial.distance.jensenshannon`) |
//! | `hellinger` | `sqrt(sum (sqrt p - sqrt q)^2 / 2)` |
//! | `tvd` | `sum abs(p - q) / 2`, the total variation distance |
//! | `chi2` | `sum (M q - M p)^2 / (M p)` of a profile (`scipy.stats.chisquare`); of a sample the statistic of the 2 x B table (`chi2_contingency`, no correction) |
//! | `smd` | the difference of the means in pooled standard deviations (Cohen's d); of a profile in its own, or in the sample's |
//! | `ks` | the largest difference of the two distribution functions (Kolmogorov-Smirnov, `scipy.stats.ks_2samp`) |

use std::collections::BTreeMap;

use statrs::distribution::{ChiSquared, ContinuousCDF as _, Normal};

use super::{Measure, Smoothing};
use crate::moments::{Moments, Summary};

/// What is compared.
#[derive(Clone, Debug)]
pub(super) enum Sample {
    /// Counts by `bin_id`.
    Counts(BTreeMap<i32, i64>),
    /// Shares by `bin_id`, of nobody knows how many.
    Shares(BTreeMap<i32, f64>),
    Moments(Box<Moments>),
    /// A mean, and a standard deviation if that is known.
    Centre(f64, Option<f64>),
    /// In ascending order once they are compared.
    Values(Vec<f64>),
}

impl Sample {
    /// What it is of; `None` if nobody knows.
    pub(super) fn count(&self) -> Option<i64> {
        match self {
            Self::Counts(counts) => Some(counts.values().sum()),
            Self::Moments(moments) => i64::try_from(moments.count()).ok(),
            Self::Values(values) => i64::try_from(values.len()).ok(),
            Self::Shares(_) | Self::Centre(..) => None,
        }
    }

    /// Adds another one of the same kind.
    pub(super) fn add(&mut self, other: &Self) {
        match (self, other) {
            (Self::Counts(all), Self::Counts(more)) => {
                for (id, count) in more {
                    *all.entry(*id).or_default() += count;
                }
            }
            (Self::Moments(all), Self::Moments(more)) => all.merge(more),
            (Self::Values(all), Self::Values(more)) => all.extend(more),
            _ => {}
        }
    }

    /// Makes it ready to be compared.
    pub(super) fn settle(&mut self) {
        if let Self::Values(values) = self {
            values.sort_unstable_by(f64::total_cmp);
        }
    }
}

/// The score, of a current sample against a reference; NaN if there is none.
pub(super) fn score(measure: Measure, smoothing: Smoothing, reference: &Sample, current: &Sample) -> f64 {
    match (measure, reference, current) {
        (Measure::Ks, Sample::Values(reference), Sample::Values(current)) => {
            kolmogorov_smirnov(reference, current)
        }
        (Measure::Smd, _, Sample::Moments(current)) => mean_difference(reference, &current.clone().summary()),
        (_, _, Sample::Counts(_)) => {
            Shares::of(smoothing, reference, current).map_or(f64::NAN, |shares| shares.score(measure))
        }
        _ => f64::NAN,
    }
}

/// The threshold that chance passes with a probability of `alpha`, of the same samples; `None` if there is no such rule.
pub(super) fn significant(measure: Measure, alpha: f64, reference: &Sample, current: &Sample) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "counts beyond 2^53 are rounded")]
    let share = |sample: &Sample| sample.count().map(|count| 1.0 / count as f64);
    // A profile is what it is: chance is in the sample alone.
    let parts = share(current)? + share(reference).unwrap_or_default();
    let normal = || Some(Normal::standard().inverse_cdf(1.0 - alpha / 2.0));
    match measure {
        Measure::Smd => Some(normal()? * parts.sqrt()),
        // Smirnov's limit, for large samples.
        Measure::Ks => Some((-(alpha / 2.0).ln() / 2.0).sqrt() * parts.sqrt()),
        Measure::Tvd => None,
        Measure::Psi | Measure::Js | Measure::Hellinger | Measure::Chi2 => {
            let limit = chi_square_limit(ids(reference, current).len(), alpha)?;
            // For small differences all of them are multiples of the sum of (p - q)^2 / p, which is a chi-square by these parts.
            Some(match measure {
                Measure::Psi => limit * parts,
                Measure::Js => (limit * parts / (8.0 * std::f64::consts::LN_2)).sqrt(),
                Measure::Hellinger => (limit * parts / 8.0).sqrt(),
                _ => limit,
            })
        }
    }
}

fn chi_square_limit(bins: usize, alpha: f64) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "a few bins")]
    let freedom = bins.saturating_sub(1) as f64;
    // Of one bin there are no two opinions.
    if freedom == 0.0 { Some(0.0) } else { Some(ChiSquared::new(freedom).ok()?.inverse_cdf(1.0 - alpha)) }
}

/// The bins that count: all of two samples, those of a profile.
fn ids(reference: &Sample, current: &Sample) -> Vec<i32> {
    let of = |sample: &Sample| match sample {
        Sample::Counts(counts) => {
            counts.iter().filter(|(_, count)| **count != 0).map(|(id, _)| *id).collect()
        }
        Sample::Shares(shares) => shares.keys().copied().collect::<Vec<i32>>(),
        _ => Vec::new(),
    };
    let mut ids = of(reference);
    if !matches!(reference, Sample::Shares(_)) {
        ids.extend(of(current));
        ids.sort_unstable();
        ids.dedup();
    }
    ids
}

#[expect(clippy::cast_precision_loss, reason = "counts beyond 2^53 are rounded")]
fn weight(sample: &Sample, id: i32) -> f64 {
    match sample {
        Sample::Counts(counts) => counts.get(&id).copied().unwrap_or_default() as f64,
        Sample::Shares(shares) => shares.get(&id).copied().unwrap_or_default(),
        _ => f64::NAN,
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts beyond 2^53 are rounded")]
fn weight_of_all(sample: &Sample) -> f64 {
    sample.count().unwrap_or_default() as f64
}

/// The population stability index of shares, as Scouter has it.
pub(super) fn score_of_shares(profile: &Sample, observed: &BTreeMap<i32, f64>) -> f64 {
    let observed = Sample::Shares(observed.clone());
    let ids = ids(profile, &observed);
    let weights = |sample: &Sample| ids.iter().map(|id| weight(sample, *id)).collect::<Vec<f64>>();
    let shares = Shares::new(Smoothing::Scouter, (&weights(profile), false), (&weights(&observed), 1.0));
    shares.map_or(0.0, |shares| shares.score(Measure::Psi))
}

/// The score of two lists of weights of the same bins; `None` if one is empty.
pub(super) fn weigh(
    measure: Measure,
    smoothing: Smoothing,
    reference: &[f64],
    current: &[f64],
) -> Option<f64> {
    let shares = Shares::new(smoothing, (reference, true), (current, current.iter().sum()))?;
    Some(shares.score(measure))
}

/// The shares of two samples in the same bins, none of which is empty in both.
struct Shares {
    pairs: Vec<(f64, f64)>,
    /// What they are shares of; of a profile nobody knows.
    of: (Option<f64>, f64),
}

impl Shares {
    /// `None` if one of the samples is empty.
    fn of(smoothing: Smoothing, reference: &Sample, current: &Sample) -> Option<Self> {
        let ids = ids(reference, current);
        let weights = |sample: &Sample| ids.iter().map(|id| weight(sample, *id)).collect::<Vec<f64>>();
        let is_counted = !matches!(reference, Sample::Shares(_));
        // What of the current sample is in no bin of a profile still counts.
        let of = weight_of_all(current);
        Self::new(smoothing, (&weights(reference), is_counted), (&weights(current), of))
    }

    /// Of the weights of each bin, which of the reference are shares unless they are counted, and all that the current ones are shares of.
    fn new(smoothing: Smoothing, reference: (&[f64], bool), current: (&[f64], f64)) -> Option<Self> {
        #[expect(clippy::cast_precision_loss, reason = "a few bins")]
        let added = if smoothing == Smoothing::Count { (1.0, reference.0.len() as f64) } else { (0.0, 0.0) };
        let counted = reference.1.then(|| reference.0.iter().sum::<f64>());
        // What is less than nothing is a share of nothing.
        let is_wrong = reference.0.iter().chain(current.0).any(|weight| *weight < 0.0);
        if current.1 <= 0.0 || counted == Some(0.0) || reference.0.is_empty() || is_wrong {
            return None;
        }
        let part = |weight: f64, of: f64| (weight + added.0) / (of + added.1);
        let pair = |(p, q): (&f64, &f64)| (counted.map_or(*p, |of| part(*p, of)), part(*q, current.1));
        let mut pairs: Vec<(f64, f64)> = reference.0.iter().zip(current.0).map(pair).collect();
        match smoothing {
            Smoothing::Scouter => pairs.iter_mut().for_each(|(p, q)| {
                *p += SCOUTER_EPSILON;
                *q += SCOUTER_EPSILON;
            }),
            Smoothing::Evidently => {
                let filled = |of: fn(&(f64, f64)) -> f64| {
                    let least =
                        pairs.iter().map(of).filter(|share| *share > 0.0).fold(f64::INFINITY, f64::min);
                    if least <= EVIDENTLY_SHARE { least / 1e6 } else { EVIDENTLY_SHARE }
                };
                let (of_p, of_q) = (filled(|pair| pair.0), filled(|pair| pair.1));
                for (p, q) in &mut pairs {
                    *p = if *p == 0.0 { of_p } else { *p };
                    *q = if *q == 0.0 { of_q } else { *q };
                }
            }
            Smoothing::Count | Smoothing::Off => {}
        }
        Some(Self { pairs, of: (counted, current.1) })
    }

    fn score(&self, measure: Measure) -> f64 {
        let sum = |term: &dyn Fn(f64, f64) -> f64| self.pairs.iter().map(|(p, q)| term(*p, *q)).sum::<f64>();
        // What is 0 times a logarithm is 0.
        let divergence = |p: f64, q: f64| if p > 0.0 { p * (p / q).log2() } else { 0.0 };
        match measure {
            Measure::Psi => sum(&|p, q| if p == q { 0.0 } else { (p - q) * (p / q).ln() }),
            Measure::Js => {
                let middle = |p: f64, q: f64| f64::midpoint(p, q);
                let both = sum(&|p, q| divergence(p, middle(p, q)) + divergence(q, middle(p, q))) / 2.0;
                // Rounding may leave a little less than nothing.
                both.max(0.0).sqrt()
            }
            Measure::Hellinger => (sum(&|p, q| (p.sqrt() - q.sqrt()).powi(2)) / 2.0).sqrt(),
            Measure::Tvd => sum(&|p, q| (p - q).abs()) / 2.0,
            Measure::Chi2 => match self.of {
                (None, of) => sum(&|p, q| of * (q - p).powi(2) / p),
                (Some(n), m) => sum(&|p, q| {
                    let expected = (n * p + m * q) / (n + m);
                    (n * (p - expected).powi(2) + m * (q - expected).powi(2)) / expected
                }),
            },
            Measure::Smd | Measure::Ks => f64::NAN,
        }
    }
}

/// What Scouter adds to both shares (`PsiMonitor::compute_psi`).
const SCOUTER_EPSILON: f64 = 1e-10;

/// What Evidently has for a share of nothing (`get_binned_data`, `feel_zeroes`).
const EVIDENTLY_SHARE: f64 = 1e-4;

fn mean_difference(reference: &Sample, current: &Summary) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "counts beyond 2^53 are rounded")]
    let freedom = |summary: &Summary| summary.count.saturating_sub(1) as f64;
    let (mean, deviation) = match reference {
        Sample::Moments(moments) => {
            let found = moments.clone().summary();
            let (n, m) = (freedom(&found), freedom(current));
            // In units of the larger one, whose square may be none any more.
            let unit = found.stddev.max(current.stddev);
            let part = |deviation: f64| if unit == 0.0 { 0.0 } else { (deviation / unit).powi(2) };
            let pooled = unit * ((n * part(found.stddev) + m * part(current.stddev)) / (n + m)).sqrt();
            (found.mean, pooled)
        }
        Sample::Centre(mean, deviation) => (*mean, deviation.unwrap_or(current.stddev)),
        _ => return f64::NAN,
    };
    if current.mean == mean {
        return 0.0;
    }
    if deviation.is_infinite() {
        return f64::NAN;
    }
    let difference = current.mean / deviation - mean / deviation;
    // The quotient of each may be infinite where that of their difference is not.
    if difference.is_finite() { difference } else { (current.mean - mean) / deviation }
}

/// Of samples in ascending order.
fn kolmogorov_smirnov(reference: &[f64], current: &[f64]) -> f64 {
    if reference.is_empty() || current.is_empty() {
        return f64::NAN;
    }
    #[expect(clippy::cast_precision_loss, reason = "as many values as fit into memory")]
    let share = |below: usize, values: &[f64]| below as f64 / values.len() as f64;
    let (mut i, mut j, mut largest) = (0, 0, 0.0_f64);
    while let (Some(a), Some(b)) = (reference.get(i), current.get(j)) {
        let value = a.min(*b);
        i += reference.iter().skip(i).take_while(|other| **other <= value).count();
        j += current.iter().skip(j).take_while(|other| **other <= value).count();
        largest = largest.max((share(i, reference) - share(j, current)).abs());
    }
    largest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(counts: &[i64]) -> Sample {
        Sample::Counts(
            counts.iter().enumerate().map(|(id, count)| (i32::try_from(id).unwrap(), *count)).collect(),
        )
    }

    fn near(found: f64, wanted: f64) {
        assert!((found - wanted).abs() < 1e-12 * wanted.abs().max(1.0), "{found} is not {wanted}");
    }

    #[test]
    fn equal_samples_are_not_far_and_opposite_ones_as_far_as_can_be() {
        let (one, other) = (counts(&[10, 0, 30]), counts(&[0, 50, 0]));
        for measure in [Measure::Psi, Measure::Js, Measure::Hellinger, Measure::Tvd, Measure::Chi2] {
            near(score(measure, Smoothing::Off, &one, &counts(&[100, 0, 300])), 0.0);
        }
        for measure in [Measure::Js, Measure::Hellinger, Measure::Tvd] {
            near(score(measure, Smoothing::Off, &one, &other), 1.0);
        }
        assert_eq!(score(Measure::Psi, Smoothing::Off, &one, &other), f64::INFINITY);
        // The whole table is explained by the two rows.
        near(score(Measure::Chi2, Smoothing::Off, &one, &other), 90.0);
        assert!(score(Measure::Psi, Smoothing::Scouter, &one, &counts(&[0, 0, 0])).is_nan());
        assert!(score(Measure::Tvd, Smoothing::Off, &one, &counts(&[-5, 10, 10])).is_nan());
    }

    #[test]
    fn the_index_is_scouters() {
        let profile = Sample::Shares([(1, 0.3), (2, 0.4), (3, 0.3)].into());
        let observed = Sample::Counts([(1, 20), (2, 40), (3, 40)].into());
        let term = |p: f64, q: f64| (p + 1e-10 - (q + 1e-10)) * ((p + 1e-10) / (q + 1e-10)).ln();
        near(
            score(Measure::Psi, Smoothing::Scouter, &profile, &observed),
            term(0.3, 0.2) + term(0.4, 0.4) + term(0.3, 0.4),
        );
        // A bin that nothing fell into counts, one that the profile has not does not.
        let other = Sample::Counts([(1, 50), (9, 50)].into());
        assert!(score(Measure::Psi, Smoothing::Scouter, &profile, &other) > 10.0);
        // chi2.ppf(0.95, 2) / 100, as Scouter has it; of a sample of 50 its own chance comes to that.
        near(significant(Measure::Psi, 0.05, &profile, &observed).unwrap(), 0.05991464547107979);
        let sample = Sample::Counts([(1, 15), (2, 20), (3, 15)].into());
        near(significant(Measure::Psi, 0.05, &sample, &observed).unwrap(), 5.991464547107979 * (0.02 + 0.01));
    }

    #[test]
    fn means_and_distribution_functions_are_compared() {
        let moments = |values: &[f64]| {
            let mut moments = Moments::default();
            values.iter().for_each(|value| moments.add(Some(*value)));
            Sample::Moments(Box::new(moments))
        };
        // Both have a variance of 1, and means that are 2 apart.
        near(
            score(Measure::Smd, Smoothing::Off, &moments(&[1.0, 2.0, 3.0]), &moments(&[3.0, 4.0, 5.0])),
            2.0,
        );
        near(
            score(Measure::Smd, Smoothing::Off, &Sample::Centre(2.0, Some(4.0)), &moments(&[3.0, 4.0, 5.0])),
            0.5,
        );
        near(
            score(Measure::Smd, Smoothing::Off, &Sample::Centre(3.0, None), &moments(&[3.0, 4.0, 5.0])),
            1.0,
        );
        // Squares that are no doubles.
        near(
            score(Measure::Smd, Smoothing::Off, &moments(&[-1e300, 1e300]), &moments(&[0.0, 2e300])),
            std::f64::consts::FRAC_1_SQRT_2,
        );
        let ks = |a: &[f64], b: &[f64]| {
            score(Measure::Ks, Smoothing::Off, &Sample::Values(a.to_vec()), &Sample::Values(b.to_vec()))
        };
        near(ks(&[1.0, 2.0, 3.0, 4.0], &[3.0, 4.0, 5.0, 6.0]), 0.5);
        near(ks(&[1.0, 1.0, 1.0], &[1.0]), 0.0);
        near(ks(&[1.0], &[2.0]), 1.0);
        assert!(ks(&[], &[1.0]).is_nan());
    }
}
