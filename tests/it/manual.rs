//! The man page is made from what the program itself knows of its commands. `SNAPFS_WRITE_MANUAL=1` writes it anew.

use std::path::Path;

use clap_mangen::Man;

/// The body of a section as the generator makes it, without its heading.
fn body(render: impl FnOnce(&mut Vec<u8>) -> std::io::Result<()>) -> String {
    let mut bytes = Vec::new();
    render(&mut bytes).unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let is_heading = |line: &&str| line.starts_with(".SH") || line.starts_with(".ie") || line.starts_with(".el");
    let text: String = text.lines().filter(|line| !is_heading(line)).map(|l| format!("{}\n", l.trim_end())).collect();
    // Every command has it: not worth three lines each.
    text.replace(".TP\n\\fB\\-h\\fR, \\fB\\-\\-help\\fR\nPrint help\n", "")
}

/// Text that keeps its lines.
fn as_it_stands(text: &str) -> String {
    let escaped = |line: &str| {
        let line = line.replace('\\', "\\\\").replace('-', "\\-");
        if line.starts_with(['.', '\'']) { format!("\\&{line}\n") } else { format!("{line}\n") }
    };
    format!(".nf\n{}.fi\n", text.trim_end().lines().map(escaped).collect::<String>())
}

fn page() -> String {
    let mut command = snapfs::cli::command();
    command.build();
    let extra = |command: &clap::Command| command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let mut page = format!(".TH SNAPFS 1 \"\" \"snapfs {}\"\n", env!("CARGO_PKG_VERSION"));
    page.push_str(&format!(".SH NAME\nsnapfs \\- {}\n", about.replace('-', "\\-")));
    page.push_str(".SH SYNOPSIS\n\\fBsnapfs\\fR \\fICOMMAND\\fR [\\fISTORE\\fR] [\\fIARGUMENT\\fR...]\n");
    page.push_str(".SH COMMANDS\n");
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help" && !sub.is_hide_set()) {
        let man = Man::new(sub.clone());
        page.push_str(&format!(".SS \"snapfs {}\"\n", sub.get_name()));
        page.push_str(&body(|out| man.render_synopsis_section(out)));
        page.push_str(".PP\n");
        page.push_str(&body(|out| man.render_description_section(out)));
        page.push_str(&body(|out| man.render_options_section(out)));
        page.push_str(".PP\n");
        page.push_str(&as_it_stands(&extra(sub)));
    }
    page.push_str(".SH NOTES\n");
    page.push_str(&as_it_stands(&extra(&command)));
    page
}

#[test]
fn the_manual_says_what_the_program_knows() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/man/snapfs.1");
    let made = page();
    if std::env::var_os("SNAPFS_WRITE_MANUAL").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = kept.lines().zip(made.lines()).position(|(a, b)| a != b).map_or(0, |line| line + 1);
    assert!(kept == made, "docs/man/snapfs.1, line {differs}: not up to date; run with SNAPFS_WRITE_MANUAL=1");
    for command in snapfs::cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = command.get_name();
        assert!(name == "help" || made.contains(&format!(".SS \"snapfs {name}\"")), "{name}");
    }
}
