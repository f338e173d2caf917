//! `highwater completions` and `highwater man`: what shells and man(1) want to know of the command line.

use std::io::Write as _;

use clap::{Command, ValueEnum};
use clap_complete::{Shell, generate};

use super::print_as_it_is;
use crate::error::{Error, Result};

/// The shells for which there are completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ShellName {
    Bash,
    Zsh,
    Fish,
}

/// Prints a script that completes the command line.
pub(super) fn completions(mut command: Command, shell: ShellName) -> Result<()> {
    let shell = match shell {
        ShellName::Bash => Shell::Bash,
        ShellName::Zsh => Shell::Zsh,
        ShellName::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    generate(shell, &mut command, "highwater", &mut script);
    print_as_it_is(String::from_utf8_lossy(&script).trim_end())
}

/// Prints the manual page, with all subcommands.
pub(super) fn man(command: Command) -> Result<()> {
    let mut page = Vec::new();
    let failed = Error::io("writing the manual page");
    let write = |page: &mut Vec<u8>| -> std::io::Result<()> {
        clap_mangen::Man::new(command.clone()).render(page)?;
        for one in command.get_subcommands().filter(|one| !one.is_hide_set()) {
            let name = one.get_name();
            writeln!(page, ".SH HIGHWATER {}", name.to_uppercase())?;
            let man = clap_mangen::Man::new(one.clone().bin_name(format!("highwater {name}")));
            man.render_synopsis_section(page)?;
            man.render_description_section(page)?;
            man.render_options_section(page)?;
        }
        Ok(())
    };
    write(&mut page).map_err(failed)?;
    print_as_it_is(String::from_utf8_lossy(&page).trim_end())
}
