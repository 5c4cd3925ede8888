//! `snapfs demo`: the whole tour on a made image, in a temporary folder that is gone afterwards.
//!
//! What it shows are the commands that a user types, run by this very binary.

mod image;
mod machine;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cli::demo::image::{change_image, make_image};
use crate::cli::demo::machine::{Machine, Tool};
use crate::cli::output::{self, Levels};
use crate::cli::stats::usage_of;
use crate::cli::store_arg::parse_size;
use crate::cli::{DONE, Outcome, Stop};
use crate::clock::SystemClock;
use crate::error::{Error, ErrorKind, Result, corrupt, invalid};
use crate::name::{SnapshotName, VmName};
use crate::store::{MemoryShares, Store};

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  snapfs demo
  snapfs demo --size 1G

Makes an ext4 image from files of this machine, backs it up, changes it, backs it up again, shows what each level
of deduplication saved, reads everything back and compares it. Needs about three times the size of the image in
the temporary folder (TMPDIR), root or fusermount3 for the mount, and root for looking into the image.";

/// The image: large enough to show something, small enough for a minute.
const SIZE_DEFAULT: &str = "256M";

/// Below, mke2fs makes something else than usual; above, it is no demo.
const SIZES: std::ops::RangeInclusive<u64> = 64 << 20..=16 << 30;

/// The VM, and what stands under it.
const VM: &str = "web01";
const DAYS: [&str; 2] = ["monday", "tuesday"];

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
pub struct Demo {
    /// Size of the image
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = SIZE_DEFAULT)]
    size: u64,
}

impl Demo {
    /// Runs the tour. Whatever happens, nothing is left mounted, and the folder is removed.
    ///
    /// # Errors
    /// Whatever a step met; a signal ends the tour like a failed step.
    pub fn run(&self) -> Outcome {
        if !SIZES.contains(&self.size) {
            let (least, most) = (output::size(*SIZES.start()), output::size(*SIZES.end()));
            return Err(Stop::usage(invalid(format!("the demo's image has from {least} to {most}"))));
        }
        let machine = Machine::new(self.size)?;
        tour(&machine, self.size)
    }
}

fn tour(machine: &Machine, size: u64) -> Outcome {
    say(format!("The tour takes place in {}, which is removed afterwards.", machine.folder().display()))?;

    heading("An image, made from files of this machine")?;
    let made = make_image(machine, "monday.raw", size)?;

    heading("A store")?;
    machine.snapfs(&["init", "store"])?;
    let mounted = mount(machine)?;

    heading("Monday's backup")?;
    take(machine, mounted, "monday")?;

    heading("A day later: some files are rewritten, some move, a log grows")?;
    change_image(machine, &made, "monday.raw", "tuesday.raw")?;

    heading("Tuesday's backup")?;
    take(machine, mounted, "tuesday")?;
    if mounted {
        machine.show("ls -l mnt/web01")?;
        for line in machine.output(Tool::new("ls").args(["-l", "mnt/web01"]))?.lines() {
            say(format!("  {line}"))?;
        }
    }

    heading("What each level of deduplication saved")?;
    savings(machine)?;

    heading("Reading it back, byte by byte")?;
    compare(machine, mounted)?;
    look_inside(machine, mounted, made.has_file_system)?;

    heading("Closing")?;
    if mounted {
        machine.snapfs(&["umount", "mnt"])?;
        machine.is_unmounted("mnt");
    }
    machine.snapfs(&["check", "store", "--read-data"])?;
    say("\nThat was the tour: both images came back as they were. `snapfs --help` lists the commands.")?;
    Ok(DONE)
}

fn say(text: impl AsRef<str>) -> std::result::Result<(), Stop> {
    output::line(text)
}

fn heading(text: &str) -> std::result::Result<(), Stop> {
    say(format!("\n== {text}"))
}

/// Mounts the store where that is possible; says why where it is not.
fn mount(machine: &Machine) -> std::result::Result<bool, Stop> {
    if let Err(reason) = machine.can_mount() {
        say(format!("No mount here ({reason}): the tour uses `snapfs backup` and `snapfs restore`."))?;
        return Ok(false);
    }
    machine.make_folder("mnt")?;
    machine.will_mount("mnt", true);
    match machine.snapfs(&["mount", "store", "mnt"]) {
        Ok(()) => Ok(true),
        Err(stop) => {
            machine.check_signal()?;
            let reason = stop.message.unwrap_or_default();
            say(format!("The mount failed ({reason}): the tour uses `snapfs backup` and `snapfs restore`."))?;
            Ok(false)
        }
    }
}

/// Makes a snapshot of `DAY.raw`: by copying it in and renaming it, or by `backup`.
fn take(machine: &Machine, mounted: bool, day: &str) -> std::result::Result<(), Stop> {
    let (raw, part, img) = (format!("{day}.raw"), format!("mnt/{VM}/{day}.part"), format!("mnt/{VM}/{day}.img"));
    if !mounted {
        return machine.snapfs(&["backup", "store", &format!("{VM}/{day}.img"), &raw]);
    }
    if !machine.path(&format!("mnt/{VM}")).is_dir() {
        machine.show(&format!("mkdir mnt/{VM}"))?;
        machine.make_folder(&format!("mnt/{VM}"))?;
    }
    machine.show(&format!("cp --sparse=always {raw} {part}"))?;
    match machine.tool("cp") {
        Some(cp) => machine.quietly(Tool::new(cp).args(["--sparse=always", raw.as_str(), part.as_str()]))?,
        None => {
            std::fs::copy(machine.path(&raw), machine.path(&part)).map_err(|e| Error::io(part.clone(), e))?;
        }
    }
    machine.show(&format!("mv {part} {img}"))?;
    std::fs::rename(machine.path(&part), machine.path(&img)).map_err(|e| Error::io(img, e))?;
    Ok(())
}

/// The table of levels, a column a day, and what the store takes for both.
fn savings(machine: &Machine) -> std::result::Result<(), Stop> {
    let store = Store::open(&machine.path("store"), Arc::new(SystemClock::new()), MemoryShares::default())?;
    let mut images = Vec::new();
    for day in DAYS {
        let name = SnapshotName::parse(&format!("{VM}/{day}.img"))?;
        let (_, _, image) = store.open_reference(&name.into())?;
        let root = image.tree().root();
        images.push((root.image_bytes, Levels::of(root.image_bytes, &root.tally)));
    }
    let mut rows = vec![row("image", images.iter().map(|(bytes, _)| *bytes))];
    for (at, (what, _)) in images.iter().flat_map(|(_, levels)| levels.rows()).take(8).enumerate() {
        rows.push(row(what, images.iter().filter_map(|(_, levels)| levels.rows().get(at).map(|(_, bytes)| *bytes))));
    }
    output::print(&output::table(&["", "MONDAY", "TUESDAY"], &[], &rows))?;
    let vm = VmName::new(VM)?;
    let (_, state) = store.vm(&vm)?;
    let usage = usage_of(&store, &vm, &state)?;
    let images = images.iter().map(|(bytes, _)| *bytes).sum();
    say(format!(
        "Two images of {} with {} of data take {} in the store.",
        output::size(images),
        output::size(usage.data_bytes),
        output::size(usage.stored_bytes)
    ))
}

fn row(what: &str, bytes: impl Iterator<Item = u64>) -> Vec<String> {
    let mut row = vec![what.to_owned()];
    row.extend(bytes.map(output::size));
    row
}

fn compare(machine: &Machine, mounted: bool) -> std::result::Result<(), Stop> {
    for day in DAYS {
        let raw = format!("{day}.raw");
        let copy = if mounted {
            let copy = format!("mnt/{VM}/{day}.img");
            machine.show(&format!("cmp {copy} {raw}"))?;
            copy
        } else {
            let copy = format!("{day}.restored");
            machine.snapfs(&["restore", "store", &format!("{VM}/{day}.img"), &copy])?;
            machine.show(&format!("cmp {copy} {raw}"))?;
            copy
        };
        let bytes = same_bytes(machine, &machine.path(&copy), &machine.path(&raw))?;
        say(format!("{copy}: all {} bytes are the same", bytes))?;
        if !mounted {
            let _ = std::fs::remove_file(machine.path(&copy));
        }
    }
    Ok(())
}

/// Compares two files. Returns their size.
fn same_bytes(machine: &Machine, left: &Path, right: &Path) -> Result<u64> {
    let open = |path: &Path| File::open(path).map_err(|e| Error::io(path.display().to_string(), e));
    let mut files = [open(left)?, open(right)?];
    let mut buffers = [vec![0; 1 << 20], vec![0; 1 << 20]];
    let mut at = 0;
    loop {
        machine.check_signal()?;
        let mut counts = [0; 2];
        for ((file, buffer), count) in files.iter_mut().zip(&mut buffers).zip(&mut counts) {
            *count = fill(file, buffer).map_err(|e| Error::io(format!("read at byte {at}"), e))?;
        }
        let [a, b] = &buffers;
        let [n, m] = counts;
        if n != m || a.get(..n) != b.get(..m) {
            return Err(corrupt(format!("{} differs from {} near byte {at}", left.display(), right.display())));
        }
        if n == 0 {
            return Ok(at);
        }
        at += n as u64;
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

/// As root: mounts Tuesday's snapshot through a loop device, straight from the store, and lists a folder of it.
fn look_inside(machine: &Machine, mounted: bool, has_file_system: bool) -> std::result::Result<(), Stop> {
    let reason = if !has_file_system {
        "the image holds no file system"
    } else if !mounted {
        "the store is not mounted"
    } else if !machine.is_root() {
        "only root may mount an image"
    } else {
        ""
    };
    if !reason.is_empty() {
        return say(format!("Left out: a look into the image ({reason})."));
    }
    machine.make_folder("inside")?;
    let image = format!("mnt/{VM}/tuesday.img");
    let options = "ro,loop,norecovery";
    machine.show(&format!("mount -o {options} {image} inside"))?;
    machine.will_mount("inside", false);
    if let Err(e) = machine.quietly(Tool::new("mount").args(["-o", options, image.as_str(), "inside"])) {
        machine.check_signal()?;
        return say(format!("Left out: a look into the image ({e})."));
    }
    machine.show("ls inside")?;
    let names = list_folder(&machine.path("inside"))?;
    say(names.join("  "))?;
    machine.show("umount inside")?;
    machine.quietly(Tool::new("umount").args(["inside"]))?;
    machine.is_unmounted("inside");
    Ok(())
}

fn list_folder(folder: &Path) -> Result<Vec<String>> {
    let about = |e| Error::io(folder.display().to_string(), e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(about)? {
        names.push(entry.map_err(about)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    if names.is_empty() {
        return Err(Error::new(ErrorKind::Corrupt, format!("{}: nothing is in it", folder.display())));
    }
    Ok(names)
}

/// What was made of an image, and what it was made from.
struct Made {
    has_file_system: bool,
    // The files that it was made of.
    files: PathBuf,
    size: u64,
}
