# Installed in share/cmake/kvlane of the prefix. In a project:
#     find_package(kvlane REQUIRED)
#     target_link_libraries(program PRIVATE kvlane::kvlane)         # the shared library; or kvlane::static
# Everything is found from the place of this file, so that the tree can be moved.
get_filename_component(_kvlane_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

# Debian's folder of the architecture, then that of 64-bit libraries on other systems, then the plain one.
set(_kvlane_folders lib)
if(CMAKE_SIZEOF_VOID_P EQUAL 8 OR NOT CMAKE_SIZEOF_VOID_P)
    list(INSERT _kvlane_folders 0 lib64)
endif()
if(CMAKE_LIBRARY_ARCHITECTURE)
    list(INSERT _kvlane_folders 0 "lib/${CMAKE_LIBRARY_ARCHITECTURE}")
endif()

foreach(_kvlane_folder IN LISTS _kvlane_folders)
    set(_kvlane_path "${_kvlane_prefix}/${_kvlane_folder}")
    if(TARGET kvlane::kvlane OR TARGET kvlane::static)
        break()
    endif()
    if(WIN32)
        if(EXISTS "${_kvlane_prefix}/bin/kvlane.dll")
            add_library(kvlane::kvlane SHARED IMPORTED)
            set_target_properties(kvlane::kvlane PROPERTIES
                IMPORTED_LOCATION "${_kvlane_prefix}/bin/kvlane.dll"
                IMPORTED_IMPLIB "${_kvlane_path}/${CMAKE_IMPORT_LIBRARY_PREFIX}kvlane${CMAKE_IMPORT_LIBRARY_SUFFIX}")
        endif()
    elseif(EXISTS "${_kvlane_path}/libkvlane${CMAKE_SHARED_LIBRARY_SUFFIX}")
        add_library(kvlane::kvlane SHARED IMPORTED)
        set_target_properties(kvlane::kvlane PROPERTIES
            IMPORTED_LOCATION "${_kvlane_path}/libkvlane${CMAKE_SHARED_LIBRARY_SUFFIX}")
    endif()
    set(_kvlane_archive "${_kvlane_path}/${CMAKE_STATIC_LIBRARY_PREFIX}kvlane${CMAKE_STATIC_LIBRARY_SUFFIX}")
    if(EXISTS "${_kvlane_archive}")
        add_library(kvlane::static STATIC IMPORTED)
        set_target_properties(kvlane::static PROPERTIES IMPORTED_LOCATION "${_kvlane_archive}")
        if(WIN32)
            set_property(TARGET kvlane::static PROPERTY INTERFACE_LINK_LIBRARIES ws2_32 userenv ntdll bcrypt)
        else()
            # What the .pc file lists as private, without a search for threads, which would need a language to be enabled.
            set_property(TARGET kvlane::static PROPERTY INTERFACE_LINK_LIBRARIES -lpthread ${CMAKE_DL_LIBS} -lm)
        endif()
    endif()
endforeach()

foreach(_kvlane_kind kvlane static)
    if(TARGET kvlane::${_kvlane_kind})
        set_property(TARGET kvlane::${_kvlane_kind} PROPERTY INTERFACE_INCLUDE_DIRECTORIES "${_kvlane_prefix}/include")
    endif()
endforeach()
if(NOT TARGET kvlane::kvlane AND NOT TARGET kvlane::static)
    set(kvlane_FOUND FALSE)
    string(REPLACE ";" ", " _kvlane_folders "${_kvlane_folders}")
    set(kvlane_NOT_FOUND_MESSAGE "${_kvlane_prefix} has no library of kvlane in ${_kvlane_folders}")
endif()
unset(_kvlane_prefix)
unset(_kvlane_folders)
unset(_kvlane_path)
unset(_kvlane_archive)
