//! What a model was trained with, as Scouter keeps it (`drift_profile.profile`).

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::measures::{Sample, score_of_shares};
use crate::tables::Kind;
use crate::{Error, Result};

/// A profile of a model's drift.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile(Value);

#[derive(Debug, Deserialize)]
struct Features<T> {
    features: BTreeMap<String, T>,
}

#[derive(Debug, Deserialize)]
struct PsiFeature {
    bins: Vec<PsiBin>,
}

#[derive(Debug, Deserialize)]
struct PsiBin {
    id: i32,
    proportion: f64,
}

#[derive(Debug, Deserialize)]
struct SpcFeature {
    center: f64,
    three_ucl: f64,
}

#[derive(Debug, Deserialize)]
struct CustomMetrics {
    metrics: BTreeMap<String, f64>,
}

/// Standard deviations between the centre of a process and its outer limit.
const OUTER_LIMIT: f64 = 3.0;

impl Profile {
    /// A profile as Scouter writes it, in JSON.
    #[must_use]
    pub const fn new(json: Value) -> Self {
        Self(json)
    }

    /// The shares of each feature's bins.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if it is no profile of PSI.
    pub(crate) fn shares(&self) -> Result<ProfileShares> {
        self.samples(Kind::psi()).map(ProfileShares)
    }

    /// What rows of a kind are compared with, by feature or metric: shares of bins, the centre and the deviation of a process, or
    /// the value of a metric.
    pub(super) fn samples(&self, kind: Kind) -> Result<BTreeMap<String, Sample>> {
        let wrong = |error: serde_json::Error| Error::Query {
            detail: format!("this is no {} profile of Scouter ({error})", kind.name()),
        };
        if kind == Kind::psi() {
            let found = Features::<PsiFeature>::deserialize(&self.0).map_err(wrong)?;
            let shares = |(name, feature): (String, PsiFeature)| {
                let count = feature.bins.len();
                let shares: BTreeMap<i32, f64> =
                    feature.bins.iter().map(|bin| (bin.id, bin.proportion)).collect();
                let is_share = |share: &f64| (0.0..=1.0).contains(share);
                if count == 0
                    || shares.len() < count
                    || !shares.values().all(is_share)
                    || shares.values().all(|share| *share == 0.0)
                {
                    let detail =
                        format!("the bins of {name:?} in the profile are not shares of a whole, each once");
                    return Err(Error::Query { detail });
                }
                Ok((name, Sample::Shares(shares)))
            };
            return found.features.into_iter().map(shares).collect();
        }
        if kind == Kind::spc() {
            let found = Features::<SpcFeature>::deserialize(&self.0).map_err(wrong)?;
            let centre = |feature: SpcFeature| {
                Sample::Centre(feature.center, Some((feature.three_ucl - feature.center) / OUTER_LIMIT))
            };
            return Ok(found.features.into_iter().map(|(name, feature)| (name, centre(feature))).collect());
        }
        let found = CustomMetrics::deserialize(&self.0).map_err(wrong)?;
        Ok(found.metrics.into_iter().map(|(name, value)| (name, Sample::Centre(value, None))).collect())
    }
}

/// What a profile says of the bins of features.
#[derive(Debug)]
pub(crate) struct ProfileShares(BTreeMap<String, Sample>);

impl ProfileShares {
    /// The population stability index of a feature's shares, as Scouter has it; `None` of a feature that is not in the profile.
    pub(crate) fn psi(&self, feature: &str, observed: &BTreeMap<i32, f64>) -> Option<f64> {
        self.0.get(feature).map(|profile| score_of_shares(profile, observed))
    }
}
