use super::Kind;

/// One value for each of some tables.
#[derive(Clone, Debug)]
pub struct PerKind<T>(Vec<(Kind, T)>);

impl<T> PerKind<T> {
    /// The values that `of` gives.
    pub fn new(kinds: impl IntoIterator<Item = Kind>, mut of: impl FnMut(Kind) -> T) -> Self {
        Self(kinds.into_iter().map(|kind| (kind, of(kind))).collect())
    }

    /// That of a kind.
    #[must_use]
    pub fn get(&self, kind: Kind) -> Option<&T> {
        self.0.iter().find(|(other, _)| *other == kind).map(|(_, value)| value)
    }

    /// That of a kind, to be changed.
    #[must_use]
    pub fn get_mut(&mut self, kind: Kind) -> Option<&mut T> {
        self.0.iter_mut().find(|(other, _)| *other == kind).map(|(_, value)| value)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (Kind, &T)> {
        self.0.iter().map(|(kind, value)| (*kind, value))
    }

    /// All of them, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (Kind, &mut T)> {
        self.0.iter_mut().map(|(kind, value)| (*kind, value))
    }
}
