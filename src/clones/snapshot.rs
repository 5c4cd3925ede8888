//! The snapshot that a clone stands on: found, held while there is a clone of it, opened.

use crate::catalog::hold::{HoldId, hold_key};
use crate::clones::description::{Description, hex};
use crate::clones::map::CloneId;
use crate::error::{Error, ErrorKind, Result, corrupt, not_found};
use crate::image::reader::Image;
use crate::limits::HOLD_OWNER_BYTES_MAX;
use crate::name::{Reference, VmName};
use crate::random::fill_random;
use crate::store::{Store, full_name};

/// Describes a new clone of a snapshot. Nothing holds the snapshot yet.
///
/// # Errors
/// `NotFound`, `Invalid` for a draft, `Corrupt`, `Unavailable`.
pub fn describe(store: &Store, reference: &Reference) -> Result<Description> {
    let (vm, state) = store.vm(&reference.vm).map_err(|e| match e.kind() {
        ErrorKind::NotFound => not_found(format!("snapshot {reference} is not there")).because(e),
        _ => e,
    })?;
    let file = Store::resolve(&state, reference)?;
    if file.sealed.is_none() {
        let what = format!("{reference} is a draft: only a sealed snapshot can be cloned");
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    let mut clone = CloneId::default();
    fill_random(&mut clone.0)?;
    Ok(Description {
        clone,
        store: store.config().store.clone(),
        snapshot: full_name(vm.name(), &file),
        vm: vm.name().to_owned(),
        incarnation: state.incarnation,
        file: file.id,
        root: file.root,
        image_bytes: file.image_bytes,
        data_blocks: file.data_blocks,
        created: store.clock().now(),
        hold: None,
    })
}

/// Holds the snapshot for a clone; the name of the hold. `place` says where the clone is, for people.
///
/// # Errors
/// `Stale` when the snapshot was forgotten meanwhile, `Corrupt`, `NoSpace`, `ReadOnly`, `Unavailable`.
pub fn hold(store: &Store, description: &Description, place: &str) -> Result<String> {
    let vm = store.vm_handle(&VmName::new(&description.vm)?);
    // The identity comes first: by it the hold of a clone that was never finished is found.
    let mut owner = format!("clone {} in {place}", hex(&description.clone.0));
    owner.retain(|c| !c.is_control());
    while owner.len() > HOLD_OWNER_BYTES_MAX {
        owner.pop();
    }
    vm.put_hold(description.file, description.root, &owner).map(|id| id.to_string())
}

/// Lets go of what a clone held, also of one that was cut off before it could note its hold.
///
/// # Errors
/// `ReadOnly`, `Unavailable`.
pub fn release(store: &Store, description: &Description) -> Result<()> {
    let vm = store.vm_handle(&VmName::new(&description.vm)?);
    if let Some(hold) = &description.hold {
        return vm.release_hold(hold_id(hold)?);
    }
    let beginning = format!("clone {} ", hex(&description.clone.0));
    for id in vm.hold_ids()?.into_iter().filter(|id| id.root == description.root) {
        match vm.read_hold(id) {
            Ok(hold) if hold.owner.starts_with(&beginning) => vm.release_hold(id)?,
            Ok(_) => {}
            Err(e) => log::warn!("{}: whose it is cannot be told: {e}", hold_key(vm.name(), id)),
        }
    }
    Ok(())
}

/// Opens the snapshot of a clone, forgotten or not.
///
/// # Errors
/// `Stale` when nothing holds it any more, `Corrupt`, `Unavailable`.
pub fn open_base(store: &Store, description: &Description) -> Result<Image> {
    if description.store != store.config().store {
        return Err(corrupt(format!("is a clone of another store, {}", description.store)));
    }
    let vm = store.vm_handle(&VmName::new(&description.vm)?);
    let state = vm.refresh()?;
    let gone = || format!("snapshot {}: its VM was removed and made anew", description.snapshot);
    if state.incarnation != description.incarnation {
        return Err(Error::new(ErrorKind::Stale, gone()));
    }
    let hold = description.hold.as_deref().ok_or_else(|| corrupt("holds no snapshot"))?;
    let hold = hold_id(hold)?;
    if hold.root != description.root {
        return Err(corrupt(format!("holds another snapshot than its own, hold={hold}")));
    }
    let image = store.open_held(&vm, hold, &description.snapshot)?;
    if image.bytes() == description.image_bytes {
        Ok(image)
    } else {
        Err(corrupt(format!("has {} bytes, its snapshot {}", description.image_bytes, image.bytes())))
    }
}

fn hold_id(name: &str) -> Result<HoldId> {
    HoldId::parse(name).ok_or_else(|| corrupt(format!("hold {name:?} is no name of one")))
}
