//! `highwater resync`: asks the sidecar to compare every row of a table with the archive.

use clap::Args;

use super::print;
use crate::config::Config;
use crate::error::Result;
use crate::postgres::Session;
use crate::source::slot;
use crate::watermark;

#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct ResyncFlags {
    /// The table (psi_drift, or with its schema)
    #[arg(required = true, value_name = "TABLE")]
    tables: Vec<String>,
}

pub(super) async fn resync(config: &Config, flags: &ResyncFlags) -> Result<()> {
    let mut sql = Session::new(config.source.clone());
    let watermarks = sql.run(watermark::read).await?;
    for row in watermark::choose(watermarks, &config.slot, &flags.tables)? {
        let table = row.source_table.as_str();
        sql.run(async |client| watermark::resync(client, table).await).await?;
        print(&format!("{table} is marked as a gap: every row of it will be compared with the archive"))?;
    }
    print(if slot::is_held(&mut sql, &config.slot).await? {
        "The sidecar begins within seconds; `highwater --watermarks` shows state streaming when it is done."
    } else {
        "Nobody archives now; it is done when `highwater run` starts."
    })
}
