//! `highwater setup`: makes what archiving needs in the database, and says what it did and what it left.

use super::print;
use crate::config::Config;
use crate::error::Result;

pub(super) async fn setup(config: &Config) -> Result<()> {
    let report = crate::setup::setup(config).await?;
    for line in &report.done {
        print(&format!("did   {line}"))?;
    }
    for line in &report.left {
        print(&format!("left  {line}"))?;
    }
    print("\nNext: `highwater check`, then `highwater`.")
}
